"""The methods beside ours are the published formulas, the measures are what they say, and every line can be walked."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import hook_count, snapshot, unchanged

import controllability as ct

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import peer_distillation
import peers
from peer_distillation import chosen_rate, trajectory
from peer_methods import CLOSED, OURS, Metrics, Tokens, applied, kept_keys, name_of, projected, ridge, shrunk
from peer_texts import draw_elsewhere, draw_task, self_sampled

TEXTS = {
    "contexts": {
        name: {
            "context": " ".join(f"{who} lives in {city} ." for who, city in people.items()),
            "queries": [{"query": f"Where does {who} live ?"} for who in people],
            "heldout": [{"query": f"In which city does {who} stay ?"} for who in people],
        }
        for name, people in {"one": {"Mia": "Oslo", "Leo": "Rome", "Ana": "Paris"}, "two": {"Tom": "Lima", "Eva": "Cairo"}}.items()
    },
    "near": ["Where does Ida live ?"],
    "unrelated": ["Max paints in Tokyo .", "Max lives in Lima . Where does Max live ?", "Ida stays in Delhi .", "Sam has a dog ."],
}  # fmt: skip


@pytest.fixture(scope="module")
def task(embedded):
    elsewhere = draw_elsewhere(*embedded, TEXTS["near"], TEXTS["unrelated"])
    return draw_task(*embedded, "one", TEXTS["contexts"]["one"], elsewhere, 2)


@pytest.fixture(scope="module")
def rows(embedded):
    return self_sampled(embedded[0], 2, 48, 40)


@pytest.fixture(scope="module")
def metrics(embedded, rows):
    return Metrics(ct.second_moments(embedded[0], [torch.tensor(rows)]))


@pytest.fixture(scope="module")
def instance():
    """Keys (T, n), residuals (T, d), and the second moment of other inputs, C (n, n), of very different eigenvalues."""
    draw = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.double)

    others = normal(400, 24) * torch.logspace(0, -3, 24, dtype=torch.double) @ torch.linalg.qr(normal(24, 24))[0]
    return normal(6, 24), normal(6, 5), others.T @ others / 400


def dense(pair):
    return pair[0] @ pair[1]


def eye(n):
    return torch.eye(n, dtype=torch.double)


def test_patchkv_is_ridge_with_its_own_scale(instance):
    K, R, _ = instance
    G = K.T @ K
    alpha = 0.3 * G.square().sum() / G.trace()
    assert torch.allclose(dense(ridge(K, R, 0.3)), R.T @ K @ torch.linalg.inv(G + alpha * eye(24)))
    assert torch.allclose(dense(ridge(K, R, 0.0)) @ K.T, R.T), "without a penalty the keys get their values"
    assert not torch.allclose(dense(ridge(K, R, 0.3)) @ K.T, R.T, atol=0.1)


def test_memit_keeps_what_ordinary_text_reads(instance):
    K, R, C = instance
    L = torch.linalg.cholesky(C)
    found = dense(kept_keys(K, R, L, 7.0))
    assert torch.allclose(found, R.T @ K @ torch.linalg.inv(7 * C + K.T @ K))
    exact = dense(kept_keys(K, R, L, 0.0))
    assert torch.allclose(exact @ K.T, R.T), "λ → 0 is exact"
    felt = [float((dW @ C @ dW.T).trace()) for dW in (dense(ridge(K, R, 0.0)), exact, found)]
    assert felt[0] > felt[1] > felt[2], "of the exact ones it is the one of least drift, and λ takes more off"


def test_ctw_truncates_in_the_norm_that_it_minimises(instance):
    K, R, C = instance
    S = shrunk(C, 0.1)
    assert torch.allclose(S.trace(), C.trace())
    full = dense(kept_keys(K, R, torch.linalg.cholesky(S), 0.2))
    assert torch.allclose(dense(kept_keys(K, R, torch.linalg.cholesky(S), 0.2, rank=5)), full), "d is 5"
    cut = dense(kept_keys(K, R, torch.linalg.cholesky(S), 0.2, rank=2))
    assert torch.linalg.matrix_rank(cut) == 2
    M = torch.linalg.cholesky(K.T @ K + 0.2 * S)
    lost = torch.linalg.svdvals(full @ M)[2:].square().sum()
    assert torch.allclose(((full - cut) @ M).square().sum(), lost), "Eckart and Young"


def test_the_null_space_projection_leaves_heavy_directions_alone(instance):
    K, R, C = instance
    size, basis = torch.linalg.eigh(C)
    kept = size.cumsum(0) <= 0.02 * size.sum()
    assert 6 < int(kept.sum()) < 24
    P = basis[:, kept] @ basis[:, kept].T
    found = dense(projected(K, R, basis[:, kept], 0.5))
    theirs = torch.linalg.solve(P @ K.T @ K + 0.5 * eye(24), P @ K.T @ R).T  # as AlphaEdit's code has it
    assert torch.allclose(found, theirs)
    assert (found @ basis[:, ~kept]).norm() < 1e-12 * found.norm()
    assert torch.allclose(dense(projected(K, R, basis[:, kept], 0.0)) @ K.T, R.T), (
        "what is left still reaches the values"
    )


def test_the_basis_carries_its_share_of_the_moment(metrics):
    C = metrics.second(1)
    assert float(C.trace()) == pytest.approx(1, abs=1e-4)
    for share in (0.02, 0.3):
        basis = metrics.null_space(1, share)
        carried = float((basis.T @ C @ basis).trace())
        assert carried <= share < carried + float(torch.linalg.eigvalsh(C)[basis.shape[1]])


@torch.no_grad()
def test_the_sets_hold_what_the_contextual_model_says(embedded, task):
    model, _ = embedded
    for name in ("queries", "heldout"):
        texts, wanted, plain, at = task.sets[name], [], [], 0
        known = {s.source[: i + 1] for s in task.queries for i in range(len(s.source))} if name == "heldout" else set()
        for sample in texts.samples:
            with_context, without = (
                model(torch.tensor([ids])).logits[0].double() for ids in (sample.target, sample.source)
            )
            shift = len(sample.target) - len(sample.source)
            there = [j for j in range(1, len(sample.source)) if sample.source[: j + 1] not in known]
            wanted.append(with_context[[j + shift for j in there]].log_softmax(-1))
            plain.append(without[there].log_softmax(-1))
            for j in range(len(sample.source) - sample.answered, len(sample.source)):
                assert sample.source[j] == int(with_context[j + shift - 1].argmax()), "the answer is the model's own"
            at += len(there)
        wanted, plain = torch.cat(wanted), torch.cat(plain)
        assert torch.allclose(texts.wanted.double(), wanted, atol=1e-4)
        found = texts.measure(model)
        assert found["positions"] == at == len(texts.wanted)
        assert found["kl"] == pytest.approx(float((wanted.exp() * (wanted - plain)).sum(-1).mean()), rel=1e-4)
        assert found == task.unpatched[name]
        assert found["kl"] > 0.5 > task.measure(model)["unrelated"]["kl"] == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_a_projection_is_asked_for_what_its_layer_lacks(embedded, task):
    model, _ = embedded
    before, tokens = snapshot(model), Tokens(model, task)
    layers = range(len(model.model.layers))
    for way in (tokens.block_by_block, tokens.spread):
        change, _ = way(model, lambda K, R, _: ridge(K, R, 0.0), layers)
        assert set(change) == {name_of(i) for i in layers}
        with applied(model, change):
            assert not unchanged(model, before)
            now = tokens.states(model, "source", layers)
        plain = tokens.states(model, "source", layers)
        short = [float((tokens.wanted[layers[-1]] - x[layers[-1]]).norm()) for x in (now, plain)]
        assert short[0] < 0.5 * short[1]
        assert unchanged(model, before)
        assert hook_count(model) == 0
    assert tokens.weight.sum() == pytest.approx(10 + len({p for s in task.queries for p in s.prefixes()}) - 1)


@pytest.mark.parametrize("method", CLOSED)
def test_the_knob_of_every_closed_form_trades_the_queries_for_drift(embedded, task, metrics, method):
    model, _ = embedded
    before, found = snapshot(model), []
    for point in CLOSED[method](model, task, metrics):
        assert point.seconds > 0
        assert point.passes >= 2
        with applied(model, point.change):
            found.append(task.measure(model))
        assert unchanged(model, before)
    assert len(found) >= 4
    kl, drift = ([row[name]["kl"] for row in found] for name in ("queries", "unrelated"))
    strong, weak = kl.index(min(kl)), kl.index(max(kl))
    assert kl[strong] < 0.5 * task.unpatched["queries"]["kl"]
    assert drift[strong] > 1.2 * drift[weak] > 0


def test_distillation_is_bounded_in_rank_and_preservation_keeps_drift_down(embedded, task, rows):
    model, _ = embedded
    before, found = snapshot(model), {}
    asked = [p.requires_grad for p in model.parameters()]
    for name, kept in (("free", ()), ("kept", rows)):
        points = [point for point, _ in trajectory(model, task, 2, 1e-2, [1, 30], kept)]
        assert [point.knob for point in points] == ["1", "30"]
        assert points[1].passes == 1 + 30 * (5 if kept else 2)
        assert points[0].seconds < points[1].seconds
        with applied(model, points[1].change):
            found[name] = task.measure(model)
    assert torch.linalg.matrix_rank(dense(points[1].change["model.layers.1.mlp.up_proj.weight"])) == 2
    assert found["free"]["queries"]["relative"] < 0.3
    assert found["kept"]["unrelated"]["kl"] < found["free"]["unrelated"]["kl"]
    assert unchanged(model, before)
    assert hook_count(model) == 0
    assert [p.requires_grad for p in model.parameters()] == asked


def test_the_rate_is_the_one_of_the_lowest_loss(embedded, task, monkeypatch):
    monkeypatch.setattr(peer_distillation, "RATES", (1e-6, 1e-2, 10.0))
    assert chosen_rate(embedded[0], task, 2, 5) == 1e-2


def point(method, knob, drift, heldout, seconds=1.0, **more):
    measured = {"kl": drift, "same": 0.9, "positions": 9}
    sets = {"unrelated": measured, "near": measured, "heldout": {"relative": heldout}, "queries": {"relative": heldout}}
    return {"context": "c", "method": method, "knob": knob, "seconds": seconds, "passes": 2, "sets": sets} | more


def test_lines_are_compared_at_equal_drift_and_equal_held_out_quality():
    line = [point("memit", str(i), d, h) for i, (d, h) in enumerate([(0.01, 0.9), (0.1, 0.5), (1.0, 0.4)])]
    assert peers.at_drift(line, 0.1) == pytest.approx(0.5)
    assert peers.at_drift(line, 10**-1.5) == pytest.approx(0.7), "half way, in log(drift)"
    assert peers.at_drift(line, 5.0) == pytest.approx(0.4)
    assert peers.at_drift(line, 0.001) is None, "all of the line drifts more"
    assert peers.next_to(line, point("ours", "balanced", 0.15, 0.3))["knob"] == "1"
    trained = [point("lora-8", "10", 1, 0.6, 50.0), point("lora-8", "20", 1, 0.45, 100.0)]
    assert peers.cheapest(trained, 0.5) == (100.0, True)
    assert peers.cheapest(trained, 0.3) == (100.0, False)
    ours = point("ours", "balanced", 0.1, 0.5, 2.0, all={"kl": 0.11, "same": 0.9})
    assert peers.cheapest(trained, 0.5, 0.9) == (100.0, False), "they drift by 1"
    told = peers.ratios([ours, *trained])
    assert "| c | any | 2 | 100 | 1/50 |" in told
    assert "| c | ours or less | 2 | not in 100 | below 1/50 |" in told
    better = peers.better_peers([ours, *trained, *line]).splitlines()[2:]
    assert [row.split(" | ")[1:3] for row in better] == [["lora-8", "20"], ["memit", "0"], ["memit", "2"]]
    other = trained[1] | {"context": "d", "all": {"kl": 0.8, "same": 0.7}}
    table = peers.table([ours, *trained, other])
    assert table.startswith("c / d\n")
    assert (
        "| ours | balanced / – | 0.5 / – | 0.5 / – | 0.1 / – | 0.11 / – | 0.9 / – | 0.5 / – | 2 / – | 2 / – |" in table
    )
    assert "| lora-8 | – / 20 | – / 0.45 | – / 0.45 | – / 1 | – / 0.8 | – / 0.7 | – / – | – / 100 | – / 2 |" in table


@pytest.mark.slow
def test_the_benchmark_runs_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys, rows):
    monkeypatch.setattr(peer_distillation, "RATES", (1e-2,))
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    out, picture = tmp_path / "out.json", tmp_path / "line.png"

    def run(*more):
        options = [
            "--texts",
            tmp_path / "texts.json",
            "--tune",
            "two",
            "--tune-steps",
            2,
            "--marks",
            2,
            4,
            "--out",
            out,
            *more,
        ]
        monkeypatch.setattr(sys, "argv", ["peers.py", "embedded", *map(str, options)])
        peers.main()
        return capsys.readouterr().out

    run("--methods", "ours", "--contexts", "one")
    first = json.loads(out.read_text())
    assert {row["knob"] for row in first["points"]} == set(OURS)
    shown = run("--methods", *peers.METHODS, "--contexts", "one", "two", "--plot", picture)
    found = json.loads(out.read_text())
    assert found["points"][: len(first["points"])] == first["points"], "nothing is made again"
    assert {(row["context"], row["method"]) for row in found["points"]} == {
        (c, m) for c in ("one", "two") for m in peers.METHODS
    }
    for context in ("one", "two"):
        for method in peers.METHODS:
            line = [row for row in found["points"] if (row["context"], row["method"]) == (context, method)]
            assert len([row for row in line if "all" in row]) == 1
    assert set(found["rates"]) == set(peers.DISTILLED)
    table, ratios, _ = shown.split("\n\n")[-3:]
    assert [len(part.splitlines()) for part in (table, ratios)] == [2 + len(peers.METHODS), 2 + 4]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_texts_are_of_three_kinds():
    held = json.loads(peers.TEXTS.read_text())
    assert set(held["contexts"]) == {"facts", "style", "story"}
    assert (len(held["unrelated"]), len(held["near"])) == (36, 10)
    for context in held["contexts"].values():
        assert not {row["query"] for row in context["queries"]} & {row["query"] for row in context["heldout"]}
