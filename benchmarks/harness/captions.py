"""The plots that a run can have, in the order of the page, with what they show."""

CAPTIONS = {
    "ratios": "Time of the others over that of fused_rnn; above 1 fused_rnn is faster",
    "step": "Time per timestep against the hidden size",
    "scaling": "Rate against timesteps, batch rows and hidden size",
    "threads": "Rate with two threads over that with one",
    "roofline": "Rate against arithmetic intensity, and what the machine can do",
}
