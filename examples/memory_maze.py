"""Reinforcement learning: recurrent PPO in a maze that takes memory.

A corridor of random length. At its entrance a light is on, left or right; at its end the agent has
to turn to the side where the light was. Whoever does not remember is right half of the time: that
is the baseline, and no policy without memory can beat it.

Proximal policy optimisation (Schulman et al., 2017, https://arxiv.org/abs/1707.06347) over an actor
and critic that share one recurrent layer. Environments run side by side and episodes end at any
time, so a piece of experience [T, B] has several episodes in a row, and the state has to become
zero between them: in the policy's own steps and again, exactly there, when the update runs over the
piece. Our layers do that when told the `resets`; with torch.nn, `by_hand` cuts the piece up. The
time of an update is printed for fused_rnn and for torch.nn.
"""

from __future__ import annotations

import itertools
import statistics
import time

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common

FORWARD, LEFT, RIGHT = range(3)
GAMMA, LAMBDA, CLIP, EPOCHS = 0.97, 0.9, 0.2, 4


class MemoryMaze(gymnasium.Env):
    """Observation: light left, light right, at the end, and noise. Reward: 1 for the right turn,
    -1 for the wrong one, and -0.1 for a turn into the wall, which costs a step."""

    observation_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)
    longest_wait = 40

    def __init__(self, shortest: int = 3, longest: int = 8):
        self.lengths = shortest, longest

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = self.np_random.integers(*self.lengths, endpoint=True)
        self.side = self.np_random.integers(LEFT, RIGHT, endpoint=True)
        self.place = self.steps = 0
        return self._look(), {}

    def step(self, action):
        self.steps += 1
        if self.place == self.length and action != FORWARD:
            right = action == self.side
            return self._look(), 1.0 if right else -1.0, True, False, {"right": bool(right)}
        moved = action == FORWARD and self.place < self.length
        self.place += moved
        late = self.steps >= self.longest_wait
        info = {"right": False} if late else {}
        return self._look(), 0.0 if moved else -0.1, False, late, info

    def _look(self):
        lit = self.place == 0
        noise = self.np_random.uniform(-1, 1)
        seen = (lit and self.side == LEFT, lit and self.side == RIGHT, self.place == self.length)
        return np.array([*seen, noise], np.float32)


class Policy(nn.Module):
    def __init__(self, layer: nn.RNNBase):
        super().__init__()
        self.rnn = layer
        self.actor = nn.Linear(layer.hidden_size, 3)
        self.critic = nn.Linear(layer.hidden_size, 1)

    def forward(self, seen: Tensor, state, resets: Tensor):
        # seen [T, B, 4], resets [T, B] bool -> logits [T, B, 3], values [T, B], state
        if isinstance(self.rnn, (nn.GRU, nn.LSTM, nn.RNN)):
            y, state = by_hand(self.rnn, seen, state, resets)
        else:
            y, state = self.rnn(seen, state, resets=resets)
        return self.actor(y), self.critic(y).squeeze(-1), state


def by_hand(layer: nn.RNNBase, x: Tensor, state, resets: Tensor):
    """The layer over x [T, B, I], a row's state zero before each step where `resets` is set.

    One call for each run of steps without a reset in any row.
    """
    starts = [0, *(t for t in range(1, len(x)) if resets[t].any()), len(x)]
    outputs = []
    for start, stop in itertools.pairwise(starts):
        if state is not None:
            state = cleared(state, resets[start])
        y, state = layer(x[start:stop], state)
        outputs.append(y)
    return torch.cat(outputs), state


def cleared(state, rows: Tensor):
    """The state with zeros in the given rows [B]."""
    if isinstance(state, tuple):
        return tuple(cleared(s, rows) for s in state)
    return state.masked_fill(rows[:, None], 0)


class Experience:
    """Environments side by side, and a policy's experience in them, T steps at a time."""

    def __init__(self, args):
        self.args, self.state = args, None
        self.envs = [MemoryMaze(3, 5 if args.small else 8) for _ in range(args.envs)]
        self.seen = np.stack([e.reset(seed=args.seed + i)[0] for i, e in enumerate(self.envs)])
        self.resets = np.ones(args.envs, bool)

    @torch.no_grad()
    def collect(self, policy: Policy) -> tuple[dict[str, Tensor], list[bool]]:
        """T steps as tensors [T, B, ...], and for each episode that ended whether it was right."""
        began, rows, ended = self.state, [], []
        for _ in range(self.args.piece):
            seen = torch.from_numpy(self.seen).to(self.args.device)
            resets = torch.from_numpy(self.resets).to(self.args.device)
            logits, value, self.state = policy(seen[None], self.state, resets[None])
            chances = torch.distributions.Categorical(logits=logits[0])
            action = chances.sample()
            reward = self._act(action.tolist(), ended)
            over = torch.from_numpy(self.resets).to(self.args.device)
            rows.append((seen, resets, action, chances.log_prob(action), value[0], reward, over))
        names = ("seen", "resets", "action", "log_prob", "value", "reward", "over")
        piece = {n: torch.stack(c) for n, c in zip(names, zip(*rows, strict=True), strict=True)}
        following = torch.from_numpy(self.seen).to(self.args.device)
        last = policy(following[None], self.state, piece["over"][-1:])[1][0]
        piece["advantage"] = advantages(piece, last)
        return piece | {"began": began}, ended

    def _act(self, actions: list[int], ended: list[bool]) -> Tensor:
        # New arrays: tensors made from the old ones still share their memory.
        self.seen, self.resets, rewards = self.seen.copy(), self.resets.copy(), []
        for number, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            seen, reward, done, late, info = env.step(action)
            if done or late:
                ended.append(info["right"])
                seen, _ = env.reset()
            rewards.append(reward)
            self.resets[number], self.seen[number] = done or late, seen
        return torch.tensor(rewards, device=self.args.device)


def advantages(piece: dict[str, Tensor], last: Tensor) -> Tensor:
    """Generalised advantage estimates [T, B] (Schulman et al., 2015)."""
    result, sum_, following = [], torch.zeros_like(last), last
    going_on = (~piece["over"]).float()
    for t in reversed(range(len(piece["reward"]))):
        delta = piece["reward"][t] + GAMMA * following * going_on[t] - piece["value"][t]
        sum_ = delta + GAMMA * LAMBDA * going_on[t] * sum_
        following = piece["value"][t]
        result.append(sum_)
    return torch.stack(result[::-1])


def update(policy: Policy, optimizer, piece: dict[str, Tensor]) -> None:
    returns = piece["advantage"] + piece["value"]
    advantage = piece["advantage"]
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
    for _ in range(EPOCHS):
        logits, value, _ = policy(piece["seen"], piece["began"], piece["resets"])
        chances = torch.distributions.Categorical(logits=logits)
        ratio = (chances.log_prob(piece["action"]) - piece["log_prob"]).exp()
        gain = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        loss = -gain.mean() + 0.5 * F.mse_loss(value, returns) - 0.01 * chances.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()


def seconds_per_update(args, policy: Policy, piece: dict[str, Tensor]) -> dict[str, float]:
    """The same updates of the same policy with torch.nn and with fused_rnn, in turns; medians."""
    times: dict[str, list[float]] = {"torch.nn": [], "fused_rnn": []}
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.0)
    for _ in range(3 if args.small else 15):
        for name, convert in (
            ("torch.nn", common.fused_rnn.restore),
            ("fused_rnn", common.fused_rnn.replace),
        ):
            convert(policy)
            start = time.perf_counter()
            update(policy, optimizer, piece)
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(
        __doc__, cell="gru", steps=(150, 40), envs=(32, 16), piece=(32, 24), hidden=(64, 32)
    )
    args = parser.parse(argv)
    policy = Policy(common.LAYERS[args.cell](4, args.hidden)).to(args.device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    experience, right = Experience(args), []
    steps = common.Steps(args.steps, "training")
    for _ in steps:
        piece, ended = experience.collect(policy)
        update(policy, optimizer, piece)
        right += ended
        steps.note = f"right in {sum(right[-200:]) / max(1, len(right[-200:])):.0%}"
    for name, seconds in seconds_per_update(args, policy, piece).items():
        common.console.print(f"{1000 * seconds:.1f} ms per update with {name}", highlight=False)
    result = common.Result(
        "right turns in the last 200 episodes",
        sum(right[-200:]) / len(right[-200:]),
        0.5,
        "the best without memory",
        goal=0.8 if args.small else 0.95,
    )
    return common.report(args, "memory_maze", [result])


if __name__ == "__main__":
    raise SystemExit(main())
