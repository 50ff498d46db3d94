"""The main function on live models."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from controllability.errors import BadInput
from controllability.models.hooks.carried_patches import uncompiled
from controllability.models.hooks.own_modes import own_modes
from controllability.models.model_patch import ModelPatch
from controllability.models.moments import Moments, refuse_other_than_moments
from controllability.models.patches.solve import parse_joint_options, solve
from controllability.models.sweep.target_run import Progress, silent


def patch_model(
    model: nn.Module, target: Mapping[str, Any], source: Mapping[str, Any], scope: str = "each",
    via: str = "input-output", route: str = "auto", positions: tuple[Any, Any] | None = None,
    progress: Progress = silent, ridge: float = 0.0, rank: int | None = None, keep_rms: bool = False,
    moments: Moments | None = None, place: str | None = None,
) -> ModelPatch:  # fmt: skip
    """The patch with which the model at ``source`` gives what it gave at ``target``.

    ``target`` and ``source`` are keyword arguments of the model's own forward (``input_ids`` (B, T),
    ``attention_mask``, ``position_ids``, …).  Source positions correspond to the last positions of
    the target unless ``positions=(source, target)`` says otherwise.  Scope "each" gives every source
    position its own patch, "last" one patch that is exact at the last position, "all" one patch that is exact at every
    source position of every sample.  ``keep_rms`` lets scope "all" refuse, with a certificate, rather than move the RMS before a
    norm; ``ridge`` > 0 (a weight on ‖ΔW‖² beside each token's relative error) and ``rank`` (of every ΔW) make it a fit that
    promises no target.  ``moments`` (see ``second_moments``): of all exact changes of a matrix the one that ordinary text feels least,
    tr(ΔW Σ ΔWᵀ), in place of the least norm.  ``place`` is the half of a layer that takes the patch: "feed-forward"; "mixer", the map
    behind what mixes positions (attention's output projection), always by Theorem 1b; by default the first that the family has.
    The model is left as it was.  Raises ``BadInput``, ``ReadingError``, ``NotControllable`` or ``SideConditionFailed``.
    Source: [G, Thm 2, Alg. 1].

    >>> import torch
    >>> from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    >>> config = Gemma3TextConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=64)
    >>> model = Gemma3ForCausalLM(config).eval()
    >>> ids = torch.arange(5, 17)[None]
    >>> mp = patch_model(model, target={"input_ids": ids},
    ...     source={"input_ids": ids[:, -3:], "position_ids": torch.arange(9, 12)[None]})
    >>> with torch.no_grad(), mp.applied(model):
    ...     patched = model(ids[:, -3:], position_ids=torch.arange(9, 12)[None]).logits
    >>> bool(torch.allclose(patched, mp.target_logits, atol=1e-4))
    True
    """
    if scope not in ("each", "last", "all"):
        raise BadInput(f"unknown scope {scope!r}: choose each, last or all")
    joint = parse_joint_options(scope, ridge, rank, keep_rms)
    refuse_other_than_moments(moments)
    if not callable(progress):
        raise BadInput(f"progress must be a function (stage, done, total), got {type(progress).__name__}")
    model = uncompiled(model)
    with own_modes(model):
        return ModelPatch.of(
            solve(model, target, source, scope, via, route, positions, progress, joint, moments, place=place)
        )
