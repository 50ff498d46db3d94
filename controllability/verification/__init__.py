"""Which rule a wrong patch breaks: the derivation that it tries to follow, executed against its own numbers."""

from controllability.verification.diagnose import Problem as Problem, Verification as Verification, diagnose as diagnose
from controllability.verification.read_patch import read_patch as read_patch
from controllability.verification.replay import Instance as Instance
