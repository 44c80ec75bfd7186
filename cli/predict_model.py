"""The model that `photon predict` was told to use."""

from __future__ import annotations

from dataclasses import dataclass

from transformers.utils import logging

from photon_train.answering.predictor import AnswerSettings, Predictor, load_predictor


@dataclass(frozen=True)
class Model:
    """A model and how it is to answer: the options of the command, one to one."""

    place: str
    answers: AnswerSettings
    device: str
    dtype: str
    revision: str | None
    scheduler: str | None
    keep_ratio: float | None

    def load(self, device: str | None = None) -> Predictor:
        """Return it, loaded; UsageError where it cannot be."""
        logging.disable_progress_bar()
        return load_predictor(
            self.place,
            self.answers,
            device=device or self.device,
            dtype=self.dtype,
            revision=self.revision,
            scheduler=self.scheduler,
            keep_ratio=self.keep_ratio,
        )
