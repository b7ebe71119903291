"""What each training stage minimises: modules that turn a batch into a loss, and write the weights they trained.

objective(batch, draws) -> (loss, metrics); every random number comes from `draws`, a generator a clip on the batch's
device. Latents (B, C, T, h, w) are normalised; poses are raw-frame c2w (B, F, 4, 4) and intrinsics (B, F, 4) in pixels
of config.image_size.
"""

from longtake.model.objectives.draws import Draws
from longtake.model.objectives.objective import Objective, build_objective

__all__ = ["Draws", "Objective", "build_objective"]
