"""The ORDER of work as data: a program is a list of actions for each pipeline rank.

program.py    1F1B and interleaved 1F1B in megatron-core's order
simulate.py   when each action runs, from durations: makespan, bubble, who waits
draw.py       the timeline as text and SVG
"""
