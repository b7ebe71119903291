"""The second stage: an LTX-2 video transformer that refines stage-1 latents in a few steps from a truncated sigma."""

from longtake.model.refiner.refiner import Refiner, RefinerPast, RefinerStream

__all__ = ["Refiner", "RefinerPast", "RefinerStream"]
