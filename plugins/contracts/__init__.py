"""Contracts of plugins: one abstract base class for each plugin type, and the values that its methods take and return.

Token ids are ``int32`` and probabilities ``float32``. In shapes, ``n`` is a number of tokens, and ``k`` a number of
candidates per token.
"""

from .base import Engine, NoOptions, Plugin, Unsupported
from .device_drafting import DeviceBatch, DeviceDrafter, DeviceLimits
from .drafting import ROOT, Candidates, DraftBudget, Drafter, DraftRequest, DraftTree, Float32, Int32
from .kv import KVPolicy
from .retrieval import Arrays, Encoder, IndexKind, ScoreExplanation, TermWeights
from .vision import ImageFeatures, ImageLayout, LayerSchedule, PrunePlan, Region, VisualPruner

__all__ = [
    "ROOT",
    "Arrays",
    "Candidates",
    "DeviceBatch",
    "DeviceDrafter",
    "DeviceLimits",
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
