"""Classification by words, one text at a time from all logits; accuracy and F1 by counting."""

import torch


def answer_losses(model, examples):
    """Return the cross-entropy of each document's supervised tokens, summed, (documents,)."""
    losses = []
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long()[None]
        logs = model(input_ids=ids).logits[0].float().log_softmax(-1)
        places = [place for place in range(1, len(example)) if example.weights[place]]
        losses.append(-sum(logs[place - 1, int(example.input_ids[place])] for place in places))
    return torch.stack(losses)


def label_probabilities(model, prompt, answers):
    """Return the probability of each answer's first different token after a prompt, given that it is one of them."""
    offset = 0
    while len({answer[offset] for answer in answers}) == 1:
        offset += 1
    ids = torch.tensor([[*prompt, *answers[0][:offset]]])
    probabilities = model(input_ids=ids).logits[0, -1].float().softmax(-1)
    own = torch.stack([probabilities[answer[offset]] for answer in answers])
    return own / own.sum()


def macro_f1(labels, predicted):
    """Return the mean F1 over all labels that occur in either list."""
    scores = []
    for label in {*labels, *predicted}:
        pairs = list(zip(labels, predicted, strict=True))
        hits = pairs.count((label, label))
        misses = sum((own == label) != (other == label) for own, other in pairs)
        scores.append(2 * hits / (2 * hits + misses))
    return sum(scores) / len(scores)
