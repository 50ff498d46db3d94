"""Ctrl-C in any module of a forward pass, at any line that puts hooks on or takes them off, and while NumPy is imported."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import torch
from helpers import hook_count, runs, snapshot, tiny_gemma, unchanged

import controllability as ct
from controllability.models.hooks import installation as hooks
from controllability.models.hooks.carried_patches import carried


def modules_of(model):
    return [name for name, _ in model.named_modules()]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("doing", ["applied", "patch_model", "applied on top"])
def test_ctrl_c_in_any_module(doing, when):
    """A hook of somebody else's on each module in turn is where Ctrl-C is pressed."""
    model = tiny_gemma(layers=1, d=16, h=24)
    target, source = runs(context=3, query=2)
    mp = ct.patch_model(model, target, source, scope="last")  # one that fits the target run as well
    with mp.applied(model):
        on_top = ct.patch_model(model, target, source, via="output")
    before, stopped = snapshot(model), 0
    with torch.no_grad():
        plain = model(**source).logits
    for name in modules_of(model):

        def press(*_args):
            raise KeyboardInterrupt

        module = model.get_submodule(name)
        handle = (module.register_forward_pre_hook if when == "before" else module.register_forward_hook)(press)
        try:
            with torch.no_grad(), contextlib.ExitStack() as stack:
                if doing == "patch_model":
                    ct.patch_model(model, target, source)
                for patch in {"patch_model": (), "applied": (mp,), "applied on top": (mp, on_top)}[doing]:
                    stack.enter_context(patch.applied(model))
                model(**source)
        except KeyboardInterrupt:
            stopped += 1
        handle.remove()
        assert unchanged(model, before), name
        assert hook_count(model) == 0, name
        assert carried(model) == (), name
        assert all(isinstance(p, torch.nn.Parameter) for p in model.parameters())
    assert stopped > 10
    with torch.no_grad():
        assert torch.equal(model(**source).logits, plain)


class PressAt:
    """Presses Ctrl-C before the n-th line that puts hooks on or takes them off, here or in torch."""

    FILES = (hooks.__file__, torch.nn.modules.module.__file__, torch.utils.hooks.__file__)
    FUNCTIONS = {
        "before", "after", "assign", "exchange", "finally_do", "back", "_undo_all", "_unhook", "_put_down", "<lambda>",
        "register_forward_hook", "register_forward_pre_hook", "carry", "_hook", "_pre_hook",
    }  # fmt: skip

    def __init__(self, n):
        self.left, self.pressed = n, False

    def __call__(self, frame, event, _):
        code = frame.f_code
        return self.line if code.co_filename in self.FILES and code.co_name in self.FUNCTIONS else None

    def line(self, _frame, event, _):
        if event == "line" and not self.pressed:
            self.left -= 1
            if self.left < 0:
                self.pressed = True
                raise KeyboardInterrupt
        return self.line


def test_ctrl_c_while_hooks_are_put_on_or_taken_off():
    model = tiny_gemma(layers=1, d=16, h=24)
    target, source = runs(context=3, query=2)
    mp = ct.patch_model(model, target, source)
    before = snapshot(model)
    traced, lines = sys.gettrace(), 0
    while True:
        press = PressAt(lines)
        sys.settrace(press)
        try:
            with mp.applied(model):
                pass
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(traced)
        assert hook_count(model) == 0, f"line {lines}"
        assert carried(model) == (), f"line {lines}"
        assert not {"__deepcopy__", "__reduce_ex__"} & set(vars(model))
        if not press.pressed:
            break
        lines += 1
    assert lines > 100
    assert unchanged(model, before)


PRESSED = """
import sys

class Press:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            sys.meta_path.remove(self)
            raise KeyboardInterrupt

sys.meta_path.insert(0, Press())
from controllability.cli.main import main
status = main(["patch", "embedded", "--context", "Mia lives in Oslo .", "--query", "Where does Mia live ?"])
assert not any(isinstance(finder, Press) for finder in sys.meta_path)
raise SystemExit(status)
"""


@pytest.mark.parametrize("module", ["numpy._core._exceptions", "numpy._core.numeric", "torch.overrides", "datetime"])
def test_ctrl_c_while_libraries_are_imported(module):
    """NumPy makes an ImportError of one in its C code, torch hides one in NumPy: still one line and no traceback."""
    done = subprocess.run([sys.executable, "-c", PRESSED, module], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr.count("\n")) == ("", 1), done.stderr
    assert done.stderr.startswith("controllability: ")
    if module != "datetime":  # that one NumPy has forgotten
        assert (done.returncode, done.stderr) == (130, "controllability: interrupted; nothing was changed\n")
    assert done.returncode != 0
