// The tree of a block: what it looks like as text, and how it is edited.
const COMPOSED = { ">>": "one after the other", "+": "sum", "*": "product", residual: "residual: x + …" };

function quoted(text) {
  return '"' + text.replaceAll("\\", "\\\\").replaceAll('"', '\\"') + '"';
}

function shapeOf(text) {
  const sizes = text.split(",").map((s) => s.trim()).filter(Boolean).map((s) => (/^\d+$/.test(s) ? s : quoted(s)));
  return sizes.length === 1 ? `(${sizes[0]},)` : `(${sizes.join(", ")})`;
}

function fieldText(field) {
  if (field.kind === "param") {
    const shape = shapeOf(field.shape);
    return `Param(${quoted(field.name)}${shape === "()" ? "" : `, ${shape}`})`;
  }
  return field.kind === "expression" ? field.value : quoted(field.value);
}

// The text that the package reads; of a tree that it drew the very text that it writes.
function textOf(node) {
  if (node.call) {
    const shown = node.fields.filter((f) => !(f.kind === "choice" && f.value === f.default));
    return `${node.call}(${shown.map((f, i) => (f.position === i ? "" : `${f.field}=`) + fieldText(f)).join(", ")})`;
  }
  const parts = node.parts;
  if (node.sign === "residual") return `residual(${parts.length === 1 ? textOf(parts[0]) : textOf({ sign: ">>", parts })})`;
  if (parts.length < 2) return parts.length ? textOf(parts[0]) : "Identity()";
  if (node.sign !== ">>" && parts.length > 2) return `${node.sign === "+" ? "Sum" : "Product"}((${parts.map(textOf).join(", ")}))`;
  return parts.map((part) => (bracketed(part) ? `(${textOf(part)})` : textOf(part))).join(` ${node.sign} `);
}

function bracketed(node) {
  return node.parts?.length > 1 && (node.sign === ">>" || (node.sign !== "residual" && node.parts.length === 2));
}

function* fieldsOf(node) {
  for (const field of node.fields ?? []) yield field;
  for (const part of node.parts ?? []) yield* fieldsOf(part);
}

// A copy whose parameters have names of their own beside those of the tree.
function renamed(node, tree) {
  const copy = structuredClone(node);
  const taken = new Set([...fieldsOf(tree)].map((f) => f.name).filter(Boolean));
  const found = new Map();
  for (const field of fieldsOf(copy)) {
    if (!field.name) continue;
    const base = field.name;
    if (!found.has(base)) {
      const [, stem, tail] = base.match(/^(.*?)(\.(?:weight|bias))?$/);
      let name = base, n = 2;
      while (taken.has(name)) name = `${stem}${n++}${tail ?? ""}`;
      found.set(base, name);
      taken.add(name);
    }
    field.name = found.get(base);
  }
  return copy;
}

function make(tag, options = {}, ...inside) {
  const element = Object.assign(document.createElement(tag), options);
  element.append(...inside);
  return element;
}

class Composer {
  constructor(place, palette, changed) {
    Object.assign(this, { place, palette, changed });
  }

  show(tree) {
    this.tree = structuredClone(tree);
    this.draw();
  }

  draw(focus) {
    if (!this.tree.parts) this.tree = { sign: ">>", parts: [this.tree] };
    this.place.replaceChildren(make("ul", {}, this.item(this.tree, null, 0)));
    if (focus) this.place.querySelector(`[data-node="${focus}"]`)?.focus();
  }

  edited(focus) {
    this.draw(focus);
    this.changed(textOf(this.tree));
  }

  item(node, parent, index) {
    const head = make("div", { className: "part" });
    const item = make("li", {}, head);
    const name = node.call ?? COMPOSED[node.sign];
    if (node.parts) head.append(this.choice(node));
    else head.append(make("b", { textContent: node.call }));
    for (const field of node.fields ?? []) head.append(...this.inputs(node, field));
    if (parent) head.append(this.buttons(parent, index, name));
    if (node.parts) {
      const list = make("ul", {}, ...node.parts.map((part, i) => this.item(part, node, i)));
      list.append(make("li", {}, this.adder(node, name)));
      item.append(list);
    }
    return item;
  }

  choice(node) {
    const select = make("select", { ariaLabel: "how the parts are joined", className: "sign" });
    for (const [sign, words] of Object.entries(COMPOSED)) select.append(make("option", { value: sign, textContent: words, selected: sign === node.sign }));
    select.onchange = () => { node.sign = select.value; this.changed(textOf(this.tree)); };
    return select;
  }

  inputs(node, field) {
    const input = (key, label, size) => {
      const box = make("input", { value: field[key], size, spellcheck: false, autocapitalize: "off" });
      box.oninput = () => { field[key] = box.value; this.changed(textOf(this.tree)); };
      return make("label", {}, `${label} `, box);
    };
    if (field.kind === "param") return [input("name", field.field, Math.min(24, Math.max(5, field.name.length))), input("shape", "sizes", 6)];
    if (field.kind === "choice") {
      const select = make("select");
      for (const choice of field.choices) select.append(make("option", { value: choice, textContent: choice, selected: choice === field.value }));
      select.onchange = () => { field.value = select.value; this.changed(textOf(this.tree)); };
      return [make("label", {}, `${field.field} `, select)];
    }
    return [input("value", field.field, Math.min(40, Math.max(6, field.value.length)))];
  }

  buttons(parent, index, name) {
    const group = make("span", { className: "buttons" });
    const button = (sign, label, act, off) => {
      const made = make("button", { type: "button", textContent: sign, title: label, ariaLabel: `${label}: ${name}`, disabled: off });
      made.onclick = () => { act(); this.edited(); };
      group.append(made);
    };
    const parts = parent.parts;
    const swap = (to) => { [parts[index], parts[to]] = [parts[to], parts[index]]; };
    button("↑", "move up", () => swap(index - 1), index === 0);
    button("↓", "move down", () => swap(index + 1), index === parts.length - 1);
    button("[ ]", "put into a residual", () => { parts[index] = { sign: "residual", parts: [parts[index]] }; });
    button("×", "remove", () => parts.splice(index, 1));
    return group;
  }

  adder(node, name) {
    const select = make("select", { ariaLabel: `add a part to: ${name}`, className: "add" }, make("option", { textContent: "+ add a part …", value: "" }));
    this.palette.forEach((offer, i) => select.append(make("option", { value: i, textContent: offer.title })));
    select.onchange = () => {
      if (select.value === "") return;
      node.parts.push(renamed(this.palette[select.value].outline, this.tree));
      this.edited();
    };
    return select;
  }
}

if (typeof module !== "undefined") module.exports = { textOf, renamed };
