"""Where a name is from: a recurrent network reads a family name character by character.

The names are the lists of family names that the package Faker ships for its locales, without their
accents; those of more than one country are left out, since nothing could tell their origin. Names
of the test set never occur in training. Countries differ in how many names they have, so accuracy
is reported as the mean over the countries, and the picture is the confusion matrix: which languages
are taken for which.

The baseline has the same names and knows the same characters but not their order: logistic
regression on how often each character occurs.
"""

from __future__ import annotations

import importlib
import random
import unicodedata

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import common

LOCALES = {
    "Croatian": "hr_HR", "Dutch": "nl_NL", "English": "en_GB", "Estonian": "et_EE",
    "Finnish": "fi_FI", "French": "fr_FR", "German": "de_DE", "Irish": "en_IE",
    "Italian": "it_IT", "Kenyan": "en_KE", "Slovak": "sk_SK", "Spanish": "es_ES",
    "Swedish": "sv_SE", "Zulu": "zu_ZA",
}  # fmt: skip
SMALL = ("Croatian", "Italian", "Slovak", "Spanish")


def plain(name: str) -> str:
    """In the letters a to z: an accent alone would give many a country away."""
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()


def names(languages: list[str]) -> list[tuple[str, int]]:
    """(family name, index of its language), each name in one language only, in fixed order."""
    origins: dict[str, set[int]] = {}
    for index, language in enumerate(languages):
        module = importlib.import_module(f"faker.providers.person.{LOCALES[language]}")
        for name in map(plain, module.Provider.last_names):
            origins.setdefault(name, set()).add(index)
    return sorted(
        (name, *origin) for name, origin in origins.items() if len(origin) == 1 and name.isalpha()
    )


class Reader(nn.Module):
    def __init__(self, cell: str, characters: int, width: int, languages: int):
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.rnn = common.LAYERS[cell](32, width)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(width, languages)

    def forward(self, texts: list[Tensor]) -> Tensor:
        # B names as codes, of any lengths -> logits [B, languages]
        packed = pack_sequence(texts, enforce_sorted=False)
        _, state = self.rnn(packed._replace(data=self.embedding(packed.data)))
        return self.head(self.dropout(common.last_layer(state)))


def baseline(train_x, train_y, test_x, test_y, characters: int) -> float:
    def counts(texts):
        return torch.stack([torch.bincount(t.cpu(), minlength=characters) for t in texts]).numpy()

    model = LogisticRegression(max_iter=2000, class_weight="balanced")
    model.fit(counts(train_x), train_y.cpu())
    return balanced_accuracy_score(test_y.cpu(), model.predict(counts(test_x)))


def draw(args, truth, guess, languages: list[str]) -> None:
    matrix = confusion_matrix(truth, guess, normalize="true")
    figure, axis = common.plt.subplots(figsize=(7, 6), layout="constrained")
    figure.colorbar(axis.imshow(matrix, cmap="Blues", vmin=0, vmax=1), label="part of the names")
    axis.set_xticks(range(len(languages)), languages, rotation=90)
    axis.set_yticks(range(len(languages)), languages)
    axis.set(xlabel="taken for", ylabel="from")
    common.save_picture(args, "names", figure)


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(__doc__, cell="gru", steps=(1500, 250), hidden=(128, 48))
    args = parser.parse(argv)
    languages = list(SMALL if args.small else LOCALES)
    found = names(languages)
    random.Random(args.seed).shuffle(found)
    alphabet = sorted({character for name, _ in found for character in name})
    codes = {character: code for code, character in enumerate(alphabet)}
    texts = [torch.tensor([codes[c] for c in name], device=args.device) for name, _ in found]
    labels = torch.tensor([label for _, label in found], device=args.device)
    held_out = len(found) // 5
    train_x, train_y = texts[held_out:], labels[held_out:]
    test_x, test_y = texts[:held_out], labels[:held_out]

    model = Reader(args.cell, len(alphabet), args.hidden, len(languages)).to(args.device)
    trainer = common.Trainer(model, args.steps, lr=5e-3)
    weights = 1 / torch.bincount(train_y, minlength=len(languages)).float()
    steps = common.Steps(args.steps, "training")
    for _ in steps:
        # Every language as often as any other.
        rows = torch.multinomial(weights[train_y], 64, replacement=True).tolist()
        loss = F.cross_entropy(model([train_x[row] for row in rows]), train_y[rows])
        steps.note = f"loss {trainer.step(loss):.3f}"

    with torch.inference_mode():
        guess = model.eval()(test_x).argmax(-1).cpu()
    truth = test_y.cpu()
    draw(args, truth, guess, languages)
    for (name, label), number in list(zip(found, guess.tolist(), strict=False))[:8]:
        common.console.print(f"{name:>16}  {languages[number]} (is {languages[label]})")
    result = common.Result(
        f"accuracy on names never seen, mean of {len(languages)} languages",
        balanced_accuracy_score(truth, guess),
        baseline(train_x, train_y, test_x, test_y, len(alphabet)),
        "logistic regression on counts of characters",
        goal=0.72 if args.small else 0.6,
    )
    return common.report(args, "names", [result])


if __name__ == "__main__":
    raise SystemExit(main())
