"""A recipe of the smallest networks, as a plan, with changes on top."""

from functools import cache

from uni_instruct.train.plan import Plan, make_plan
from uni_instruct.train.recipe import load_recipe

TINY = [
    "network.model_channels=16",
    "network.channel_mult=[1]",
    "network.attn_resolutions=[8]",
    "critic_updates=1",
    "teacher.duration_kimg=0.1",
    "teacher.batch=8",
    "distillation.batch=8",
    "distillation.duration_kimg=0.16",
    "distillation.critic_warmup_kimg=0",
]


@cache
def tiny_plan(*changes: str) -> Plan:
    return make_plan(load_recipe("digits", [*TINY, *changes]))
