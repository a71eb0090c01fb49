"""Training objectives of VDR and XTR over a batch of pairs, in which document i is relevant to query i."""

import torch
from torch.nn import functional


def vdr_loss(
    query: torch.Tensor,
    document: torch.Tensor,
    query_bag: torch.Tensor,
    document_bag: torch.Tensor,
    top: int = 768,
    semi: bool = False,
    mask_weight: float | None = None,
) -> torch.Tensor:
    """Compute VDR's loss (ICLR 2024, section 3.2), or with ``semi`` that of its semi-parametric form, SVDR.

    One half compares the sparse weights of queries with the weights of documents, the other half the bags of words of
    queries; SVDR does both in both directions. Each comparison is a negative log-likelihood at temperature 1, along
    rows and along columns.

    Args:
        query: [batch, terms] term weights, before sparsification.
        document: [batch, terms].
        query_bag: [batch, terms] 1 for the text's own terms.
        document_bag: [batch, terms].
        top: Number of largest weights that the sparse side keeps, in addition to those of its own terms.
        semi: Whether both directions are compared.
        mask_weight: Weight of the contrastive mask, see `contrastive_mask`; None for no mask.
    """
    sparse_query, sparse_document = sparsity_loss(query, query_bag, top), sparsity_loss(document, document_bag, top)
    terms = [symmetric(sparse_query @ document.t())]
    if semi:
        terms.append(symmetric(query @ sparse_document.t()))
    bag, other = (query_bag, document) if mask_weight is None else _masked(query_bag, document, mask_weight)
    terms.append(symmetric(bag @ other.t()))
    if semi:
        bag, other = (document_bag, query) if mask_weight is None else _masked(document_bag, query, mask_weight)
        terms.append(symmetric(other @ bag.t()))
    return torch.stack(terms).mean()


def symmetric(scores: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of the diagonal of scores [batch, batch], along rows and along columns."""
    diagonal = torch.arange(len(scores), device=scores.device)
    return functional.cross_entropy(scores, diagonal) + functional.cross_entropy(scores.t(), diagonal)


def sparsity_loss(weights: torch.Tensor, bag: torch.Tensor, top: int) -> torch.Tensor:
    """Keep the ``top`` largest weights and those of the text's own terms; set the others to 0."""
    mask = bag.bool()
    if top < weights.shape[1]:
        mask = mask.scatter(1, weights.topk(top, dim=1).indices, True)
    return weights * mask


def contrastive_mask(bag: torch.Tensor) -> torch.Tensor:
    """Return the contrastive mask [batch, terms] (section 3.3).

    Term v belongs to text v mod batch, unless a text of the batch contains it. Weight on irrelevant terms then counts
    for no pair, and against all others.
    """
    batch, terms = bag.shape
    owner = torch.arange(terms, device=bag.device) % batch
    return (owner == torch.arange(batch, device=bag.device).unsqueeze(1)) & ~bag.bool().any(0)


def _masked(bag: torch.Tensor, other: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    mask = contrastive_mask(bag)
    return bag + weight * functional.normalize(mask.float()), other * ~mask


def xtr_scores(
    query: torch.Tensor, query_mask: torch.Tensor, document: torch.Tensor, document_mask: torch.Tensor, retrieved: int
) -> torch.Tensor:
    """Compute XTR's scores within a batch, [batch, batch] (arXiv 2304.01982, section 3.1); see `row_cross_entropy`.

    Each query token retrieves the ``retrieved`` most similar tokens of all documents of the batch. The score of a
    document is the sum of its largest retrieved similarities, over the number of query tokens that retrieved one of its
    tokens.

    Args:
        query: [batch, tokens, d] vectors of length one.
        query_mask: [batch, tokens] 1 for tokens, 0 for padding.
        document: [batch, tokens, d] vectors of length one.
        document_mask: [batch, tokens].
        retrieved: Number of tokens that each query token retrieves.
    """
    products = torch.einsum("qid,bjd->qibj", query, document)
    products = products.masked_fill(~document_mask.bool(), -torch.inf)
    every = products.flatten(2)
    threshold = every.topk(min(retrieved, every.shape[2]), dim=2).values[..., -1]
    best = products.masked_fill(products < threshold[..., None, None], -torch.inf).amax(
        3
    )  # [queries, tokens, documents]
    retrieved_any = torch.isfinite(best) & query_mask.bool().unsqueeze(2)
    sums = torch.where(retrieved_any, best, 0.0).sum(1)
    return sums / retrieved_any.sum(1).clamp(min=1)


def row_cross_entropy(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the cross-entropy of each query over the documents of the batch."""
    return functional.cross_entropy(scores / temperature, torch.arange(len(scores), device=scores.device))
