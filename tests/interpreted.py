"""Imported first by programs under TRITON_INTERPRET=1: makes the interpreter fast enough for tests."""

from __future__ import annotations

import dataclasses

from triton.runtime import interpreter

# Checks of integer overflow take most of the time.
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)

# A jitted function called by another patches the language anew each time; for the kernels' own the launch has done it.
_call = interpreter.InterpretedFunction.__call__


def _call_without_patching(self, *args, **kwargs):
    if self.fn.__module__.startswith("dsconv_ext"):
        return self.rewrite()(*args, **kwargs)
    return _call(self, *args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call_without_patching
