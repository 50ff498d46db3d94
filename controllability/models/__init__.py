"""Live models: reading checks, the layer sweep, applying and undoing, saving, verifying."""

from controllability.models.exact_mode import exact_mode as exact_mode
from controllability.models.generation.generate import generate as generate
from controllability.models.model_patch import (
    ModelPatch as ModelPatch,
    import_peft as import_peft,
    load_patch as load_patch,
)
from controllability.models.patch_model import patch_model as patch_model
from controllability.models.patches.diff import diff as diff
from controllability.models.patches.merging import finalize_merges as finalize_merges
from controllability.models.second_moments import (
    load_moments as load_moments,
    save_moments as save_moments,
    second_moments as second_moments,
)
