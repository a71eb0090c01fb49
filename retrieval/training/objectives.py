"""What VDR and XTR are trained for, over a batch of pairs: text i of one side belongs to text i of the other."""

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
    """VDR's loss (ICLR 2024, section 3.2), or with ``semi`` that of its semi-parametric form, SVDR.

    Half of it compares the sparse weights of one side with the other's, half the bag of words; SVDR does both both ways
    round. Each comparison is a negative log-likelihood at temperature 1 along rows and along columns.

    Args:
        query: [batch, words] weights, all of them.
        document: [batch, words].
        query_bag: [batch, words] 1 for the text's own words.
        document_bag: [batch, words].
        top: Weights that the sparse side keeps beside its own words.
        semi: Both ways round.
        mask_weight: Of the contrastive mask, see `contrastive_mask`; None for none.
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
    """Negative log-likelihood of the diagonal, [batch, batch], along rows and along columns."""
    right = torch.arange(len(scores), device=scores.device)
    return functional.cross_entropy(scores, right) + functional.cross_entropy(scores.t(), right)


def sparsity_loss(weights: torch.Tensor, bag: torch.Tensor, top: int) -> torch.Tensor:
    """The ``top`` largest weights and those of the text's own words, the others 0."""
    kept = bag.bool()
    if top < weights.shape[1]:
        kept = kept.scatter(1, weights.topk(top, dim=1).indices, True)
    return weights * kept


def contrastive_mask(bag: torch.Tensor) -> torch.Tensor:
    """[batch, words] whether a word is made one text's alone.

    Word v goes to text v mod batch, unless a text of the batch has it: weight on words that mean nothing here is taken
    from a text's partner, and costs all others (section 3.3).
    """
    batch, words = bag.shape
    owner = torch.arange(words, device=bag.device) % batch
    return (owner == torch.arange(batch, device=bag.device).unsqueeze(1)) & ~bag.bool().any(0)


def _masked(bag: torch.Tensor, other: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    mask = contrastive_mask(bag)
    return bag + weight * functional.normalize(mask.float()), other * ~mask


def xtr_loss(
    query: torch.Tensor, query_mask: torch.Tensor, document: torch.Tensor, document_mask: torch.Tensor, retrieved: int
) -> torch.Tensor:
    """XTR's scores in a batch (arXiv 2304.01982, section 3.1), [batch, batch]; the loss is `rows` of them.

    For each query token, the ``retrieved`` best tokens of all documents of the batch count. A document's score is the
    sum of its best retrieved products over the number of query tokens that retrieved something of it.

    Args:
        query: [batch, tokens, d] of length one.
        query_mask: [batch, tokens].
        document: [batch, tokens, d].
        document_mask: [batch, tokens].
        retrieved: Of all tokens of the batch.
    """
    products = torch.einsum("qid,bjd->qibj", query, document)
    products = products.masked_fill(~document_mask.bool(), -torch.inf)
    every = products.flatten(2)
    least = every.topk(min(retrieved, every.shape[2]), dim=2).values[..., -1]
    found = products.masked_fill(products < least[..., None, None], -torch.inf).amax(3)  # [queries, tokens, documents]
    there = torch.isfinite(found) & query_mask.bool().unsqueeze(2)
    sums = torch.where(there, found, 0.0).sum(1)
    return sums / there.sum(1).clamp(min=1)


def rows(scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Cross-entropy of each query over the batch's documents."""
    return functional.cross_entropy(scores / temperature, torch.arange(len(scores), device=scores.device))
