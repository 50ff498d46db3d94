"""Which rule a wrong patch breaks: the derivation that it tries to follow, executed against its own numbers.

The patched run has the patch's own deltas; at every leaf that the derivation steers, what the rule
demands there is compared with what the patch gives.  The first rule that fails is the cause; what holds
once it is mended only followed from it.
"""

from controllability.verification.diagnose import Problem as Problem, Verification as Verification, diagnose as diagnose
from controllability.verification.read_patch import read_patch as read_patch
from controllability.verification.replay import Instance as Instance
