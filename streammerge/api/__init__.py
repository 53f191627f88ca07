"""The library's verbs: merge = plan, run, report; the same without files, and what only looks."""

from streammerge.api.composing import atlas
from streammerge.api.layers import gradfix
from streammerge.api.looking import demo, describe_methods, diff, inspect, verify
from streammerge.api.merging import Token, check_out, merge
from streammerge.api.page import report
from streammerge.api.planning import RecipeLike, plan
from streammerge.api.streaming import merge_state_dicts, stream

__all__ = [
    "RecipeLike",
    "Token",
    "atlas",
    "check_out",
    "demo",
    "describe_methods",
    "diff",
    "gradfix",
    "inspect",
    "merge",
    "merge_state_dicts",
    "plan",
    "report",
    "stream",
    "verify",
]
