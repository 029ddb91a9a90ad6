# shellcheck shell=bash
# Sourced by the launchers beside it; each of them is documented by the comment at its top.
# They run on laptops too: nothing here needs more than bash 3.2, which is what macOS has.

# The comment at the top of the launcher, which is its manual.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# Ends with what is wrong, how the launcher is used, and exit code 2, as `drift` does for what a user can mend.
fail() {
    echo "error: $1" >&2
    echo >&2
    usage >&2
    exit 2
}

# The words as one line that a shell reads back as the same words.
quote() {
    local word line=""
    for word in "$@"; do
        case $word in
            "" | *[!A-Za-z0-9_./:=,@%+-]*)
                case $word in
                    *\'*) word=$(printf %q "$word") ;;
                    *) word="'$word'" ;;
                esac
                ;;
        esac
        line+="${line:+ }$word"
    done
    echo "$line"
}

# Runs a command; with DRY_RUN=1 prints it.
call() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then quote "$@"; else "$@"; fi
}
