"""Completion of commands and flags in bash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def bash_completion(flags: Mapping[str, Sequence[str]]) -> str:
    """A script for bash: commands first, then flags where a word starts with a dash, else files.

    Args:
        flags: The flags of each command.
    """
    cases = "\n".join(f'        {command}) words="{" ".join(names)}" ;;' for command, names in flags.items())
    return f"""_ddpm_hf() {{
    local words=""
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    if [ "$COMP_CWORD" = 1 ]; then words="{" ".join(flags)} --help --version"; fi
    if [ "$COMP_CWORD" = 1 ] || [ "${{2:0:1}}" = "-" ]; then
        COMPREPLY=($(compgen -W "$words" -- "$2"))
    else
        COMPREPLY=()
    fi
}}
complete -o default -F _ddpm_hf ddpm-hf"""
