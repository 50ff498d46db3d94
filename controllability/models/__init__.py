"""Live models: reading checks, the layer sweep, applying and undoing, saving, verifying."""

from controllability.models.adapters.importing import import_peft as import_peft
from controllability.models.comparing import diff as diff
from controllability.models.exact import exact_mode as exact_mode
from controllability.models.generation import generate as generate
from controllability.models.model_patch import ModelPatch as ModelPatch
from controllability.models.patching import patch_model as patch_model
from controllability.models.storing import load_patch as load_patch
