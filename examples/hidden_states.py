"""Hidden states: what a sentiment model holds in mind, word by word, drawn in two dimensions.

The model of `sentiment.py` is trained, then reads new reviews, and the state after every word is
kept: 64 numbers each. Principal components show the directions in which the states differ most,
t-SNE puts states that are alike side by side. Coloured by the review's verdict and by the word's
place in the review, they show what the network computes: states drift apart as opinions come in,
"but" draws them back, and at the end there are two groups.

What is reported: how well two principal components tell the verdict, by the nearest centre of the
two groups, at the last word; and the same at the first word, which nobody can tell anything from.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestCentroid
from torch.nn.utils.rnn import pad_packed_sequence

import common
import sentiment


def states_of(model: sentiment.Sentiment, texts: list[torch.Tensor]):
    """The states after all words of all texts, [N, H], the text and the place of each: [N]."""
    with torch.inference_mode():
        states, lengths = pad_packed_sequence(model.read(texts)[0], batch_first=True)
    text = np.repeat(np.arange(len(texts)), lengths)
    place = np.concatenate([np.arange(n) for n in lengths])
    return states.cpu().numpy()[text, place], text, place, lengths.numpy()


def separation(points, verdicts) -> float:
    """How many verdicts the nearest of two centres tells, on points that did not make them."""
    half = len(points) // 2
    centres = NearestCentroid().fit(points[:half], verdicts[:half])
    return centres.score(points[half:], verdicts[half:])


def draw(args, maps: dict[str, np.ndarray], verdicts, share) -> None:
    figure, axes = common.plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    for row, (name, points) in zip(axes, maps.items(), strict=True):
        for axis, (what, colour, cmap) in zip(
            row,
            (("the verdict", verdicts, "coolwarm"), ("the place in the review", share, "viridis")),
            strict=True,
        ):  # fmt: skip
            drawn = axis.scatter(*points.T, c=colour, cmap=cmap, s=4)
            axis.set(title=f"{name}, coloured by {what}", xticks=[], yticks=[])
            figure.colorbar(drawn)
    common.save_picture(args, "hidden_states", figure)


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(
        __doc__, cell="gru", steps=(600, 150), texts=(10_000, 3000), points=(4000, 400)
    )
    args = parser.parse(argv)
    model, _, (texts, labels) = sentiment.train(args, width=32 if args.small else 64)
    states, text, place, lengths = states_of(model, texts[:500])
    verdicts = labels.cpu().numpy()
    two = PCA(n_components=2, random_state=args.seed).fit_transform(states)
    last, first = place == lengths[text] - 1, place == 0

    chosen = np.random.default_rng(args.seed).permutation(len(states))[: args.points]
    near = TSNE(random_state=args.seed, perplexity=min(30, len(chosen) / 4))
    maps = {"PCA": two[chosen], "t-SNE": near.fit_transform(states[chosen])}
    draw(args, maps, verdicts[text[chosen]], (place / lengths[text])[chosen])
    result = common.Result(
        "verdicts told by two principal components of the last state",
        separation(two[last], verdicts[text[last]]),
        separation(two[first], verdicts[text[first]]),
        "the first state",
        goal=0.8 if args.small else 0.95,
    )
    return common.report(args, "hidden_states", [result])


if __name__ == "__main__":
    raise SystemExit(main())
