"""Draws the boxes and arrows of "How the kernels work": `python docs/drawings.py`."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "pictures"
BLUE, GREEN, ORANGE, GREY = "#dbe9f6", "#dff0d8", "#fde6c8", "#eeeeee"


class Drawing:
    """An SVG of boxes, arrows and words, on white so that it reads on a dark page too."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" font-size="13">',
            f"<title>{title}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="6" fill="white"/>',
        ]

    def box(self, x: int, y: int, width: int, height: int, lines: str, fill: str = BLUE) -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" '
            'stroke="#555"/>'
        )
        texts = lines.split("\n")
        for number, text in enumerate(texts):
            below = y + height / 2 + 4.5 + 16 * (number - (len(texts) - 1) / 2)
            self.words(x + width / 2, below, text, "middle")

    def words(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        text = text.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text}</text>')

    def arrow(self, *points: tuple[int, int], dashed: bool = False) -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="black" stroke-width="1.3"{dash} '
            'marker-end="url(#tip)"/>'
        )

    def save(self, name: str) -> None:
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / f"{name}.svg").write_text("\n".join([*self.parts, "</svg>"]) + "\n")


def path_of_a_call() -> None:
    d = Drawing(760, 354, "The way of a call through the package")
    layers = [
        ("modules", "parameters, batch_first, packed or not", BLUE),
        ("functional", "the stack of layers, dropout between them", BLUE),
        ("ops", "one operator per layer, autograd, fakes for compilers", BLUE),
        ("dispatch", "problem -> backend, and why not the others", ORANGE),
        ("backends", "one layer, forward or backward", GREEN),
    ]
    for number, (name, does, fill) in enumerate(layers):
        y = 16 + 62 * number
        d.box(20, y, 130, 40, name, fill)
        d.words(165, y + 25, does)
        if number:
            d.arrow((85, y - 22), (85, y))
    for number, (name, fill) in enumerate(
        [
            ("cpu: C++ kernels", GREEN),
            ("cuda: CUDA kernels", GREEN),
            ("triton: Triton kernels", GREEN),
            ("reference: plain torch", GREY),
        ]
    ):
        y = 178 + 42 * number
        d.box(540, y, 190, 34, name, fill)
        d.arrow((400, 282), (470, 282), (470, y + 17), (540, y + 17))
    d.box(540, 16, 190, 40, "direct: plain inference\nin one operator call", ORANGE)
    d.arrow((635, 56), (635, 178), dashed=True)
    d.words(645, 120, "inference")
    d.save("path_of_a_call")


def forward_and_backward() -> None:
    d = Drawing(760, 400, "A layer forward and backward")
    d.words(20, 26, "forward")
    d.box(20, 40, 110, 44, "x\n[T, B, I]", GREY)
    d.box(180, 40, 150, 44, "x W_ih + b\nall steps at once", BLUE)
    d.arrow((130, 62), (180, 62))
    for t in range(4):
        x = 380 + 92 * t
        d.box(x, 112, 72, 44, f"step {t}" if t < 3 else "...", ORANGE)
        d.arrow((x + 36, 84), (x + 36, 112))
        if t:
            d.arrow((x - 20, 134), (x, 134))
        d.arrow((x + 36, 156), (x + 36, 184))
    d.box(380, 40, 348, 44, "gx [T, B, G*H]", GREY)
    d.arrow((330, 62), (380, 62))
    d.box(300, 118, 50, 32, "h0", GREY)
    d.arrow((350, 134), (380, 134))
    d.box(380, 184, 348, 34, "y [T, B, H] and what backward will need", GREY)
    d.words(20, 130, "the scan: gates from gx")
    d.words(20, 148, "and W_hh h of the step before")

    d.words(20, 256, "backward")
    d.box(380, 244, 348, 34, "gradient of y, saved gates", GREY)
    for t in range(4):
        x = 380 + 92 * t
        d.box(x, 306, 72, 40, f"step {t}" if t < 3 else "...", ORANGE)
        d.arrow((x + 36, 278), (x + 36, 306))
        if t:
            d.arrow((x, 326), (x - 20, 326))
    d.arrow((380, 326), (350, 326))
    d.box(300, 310, 50, 32, "dh0", GREY)
    d.box(20, 292, 250, 34, "dx = d_gates W_ih", BLUE)
    d.box(20, 346, 250, 34, "dW_ih, dW_hh, db: sums over rows", BLUE)
    for t in range(4):
        d.arrow((416 + 92 * t, 346), (416 + 92 * t, 364))
    d.box(380, 364, 348, 26, "gradients of the gates", GREY)
    d.arrow((380, 377), (285, 377), (285, 363), (270, 363))
    d.arrow((285, 377), (285, 309), (270, 309))
    d.save("forward_and_backward")


def chunks_and_threads() -> None:
    d = Drawing(760, 300, "How a CPU call is cut into chunks and among threads")
    d.words(20, 26, "many rows: each thread has rows of its own, and nobody waits")
    for row in range(2):
        for chunk in range(3):
            x, y = 60 + 220 * chunk, 42 + 40 * row
            d.box(x, y, 100, 30, "x W_ih: chunk", BLUE)
            d.box(x + 104, y, 100, 30, "its steps", ORANGE)
        d.words(20, 62 + 40 * row, f"{row}:")
    d.words(20, 162, "few rows: each thread has hidden units of its own; all meet after every step")
    for row in range(2):
        for step in range(5):
            x, y = 60 + 130 * step, 178 + 40 * row
            d.box(x, y, 100, 30, f"half of step {step}", ORANGE)
            if step and not row:
                d.parts.append(
                    f'<line x1="{x - 15}" y1="172" x2="{x - 15}" y2="254" stroke="#a00" '
                    'stroke-width="2"/>'
                )
        d.words(20, 198 + 40 * row, f"{row}:")
    d.words(60, 280, "time runs to the right; red: a barrier")
    d.save("chunks_and_threads")


def cluster() -> None:
    d = Drawing(760, 300, "One call on a GPU: clusters of multiprocessors that keep W_hh on chip")
    d.words(20, 26, "a cluster takes its batch rows through all of time; clusters never meet")
    for part in range(4):
        x = 20 + 186 * part
        d.box(x, 42, 162, 46, f"rows of W_hh {part}\nstay on chip", GREY)
        d.box(x, 106, 162, 46, f"step t: units {part}\nW_hh h, gates, state", ORANGE)
        d.arrow((x + 81, 88), (x + 81, 106))
        d.arrow((x + 81, 152), (x + 81, 176))
        d.arrow((x + 81, 210), (x + 81, 234))
        d.box(x, 234, 162, 46, f"step t + 1: units {part}\nwaits for its h only", ORANGE)
    d.box(
        20, 176, 720, 34, "h of step t: each part is sent to all of the cluster, and written to y"
    )
    d.save("cluster")


if __name__ == "__main__":
    path_of_a_call()
    forward_and_backward()
    chunks_and_threads()
    cluster()
