"""What a plugin promises to whoever calls it: one abstract class for each kind, and the values that cross the border.

Token ids are ``int32``, probabilities ``float32``. ``n`` is a number of tokens, ``k`` of candidates per token.
"""

from .base import Engine, NoOptions, Plugin, Unsupported
from .drafting import ROOT, Candidates, DraftBudget, Drafter, DraftRequest, DraftTree, Float32, Int32
from .kv import KVPolicy
from .retrieval import Arrays, Encoder, IndexKind, ScoreExplanation, TermWeights
from .vision import ImageFeatures, ImageLayout, LayerSchedule, PrunePlan, Region, VisualPruner

__all__ = [
    "ROOT",
    "Arrays",
    "Candidates",
    "DraftBudget",
    "DraftRequest",
    "DraftTree",
    "Drafter",
    "Encoder",
    "Engine",
    "Float32",
    "ImageFeatures",
    "ImageLayout",
    "IndexKind",
    "Int32",
    "KVPolicy",
    "LayerSchedule",
    "NoOptions",
    "Plugin",
    "PrunePlan",
    "Region",
    "ScoreExplanation",
    "TermWeights",
    "Unsupported",
    "VisualPruner",
]
