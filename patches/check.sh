#!/usr/bin/env bash
# Says of any llama.cpp tree whether the patches apply and, where not, which seam has moved.
#
#   patches/check.sh DIR      DIR: a tree with or without the patches; it is not changed
#
# patches/seams.txt names every seam: what each hunk does, and what the glue relies on although no patch shows it. Ends with
# a line on each patch. Status 1: something has moved. A tree without programs (no tools/, no common/) lacks the patches
# for them, which is said and is no failure.
set -euo pipefail
# shellcheck source=patches/lib.sh
. "$(dirname "$0")/lib.sh"

tree=${1:-}
[ -f "$tree/ggml/CMakeLists.txt" ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2; }
need patch=patch
seams=$root/patches/seams.txt
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# field N ROW: the Nth of the fields between bars; \| is a bar that does not end one.
field() { sed -e 's/\\|/\x01/g' <<<"$2" | cut -d '|' -f "$1" | sed -e 's/^ //; s/ $//; s/\x01/|/g'; }

# words_of FILE HUNK: what the hunk in that file of this folder does.
words_of() {
    local row
    while IFS= read -r row; do
        if [ "$(field 2 "$row")" = "$1" ] && grep -q -F -e "$(field 3 "$row")" "$2"; then
            field 4 "$row"
            return
        fi
    done < <(grep '^hunk' "$seams")
    echo "a hunk without a name in seams.txt"
}

# Every hunk as a patch of its own, in $1; the name of a file sorts as its place in the patch.
split_patch() {
    awk -v dir="$1" '
        /^--- /      { old = $0; next }
        /^\+\+\+ /   { new = $0; next }
        /^diff --git /{ out = "" ; next }
        /^@@ /       { out = sprintf("%s/%03d", dir, ++n); print old "\n" new >out }
        out != ""    { print >out }' "$2"
}

tries() { patch -d "$tree" -p1 --dry-run --batch --force "$@" >"$work/said" 2>&1; }

moved=0
for patch in "$root"/patches/[0-9]*.patch; do
    name=$(basename "$patch" .patch)
    hunks=$work/$name
    mkdir "$hunks"
    split_patch "$hunks" "$patch"
    total=0 applied=0 already=0 absent=0
    for hunk in "$hunks"/*; do
        total=$((total + 1))
        file=$(sed -n 's,^+++ b/,,p' "$hunk")
        is_new=$(grep -c '^--- /dev/null' "$hunk" || true)
        if [ "$is_new" = 0 ] && [ ! -e "$tree/$file" ]; then
            absent=$((absent + 1))
            missing=$file
        elif tries --reverse <"$hunk" && ! grep -q fuzz "$work/said"; then
            already=$((already + 1))
        elif tries --forward <"$hunk" && ! grep -q fuzz "$work/said"; then
            applied=$((applied + 1))
        else
            moved=$((moved + 1))
            how="does not apply"
            if grep -q fuzz "$work/said"; then how="applies, but not to what stood there"; fi
            echo "MOVED   $file: $(words_of "$file" "$hunk"): $how"
        fi
    done
    if ((applied == total)); then
        echo "ok      $name: applies"
    elif ((already == total)); then
        echo "ok      $name: is already in this tree"
    elif ((absent == total)); then
        echo "none    $name: this tree has none of the files that it changes"
    else
        echo "FAILED  $name: of $total hunks $applied apply, $already are there, $absent have no file${missing:+ ($missing)}"
        if ((absent > 0)); then moved=$((moved + 1)); fi
    fi
done

relied=0
while IFS= read -r row; do
    file=$(field 2 "$row") text=$(field 3 "$row")
    relied=$((relied + 1))
    if ! grep -q -s -F -e "$text" "$tree/$file"; then
        moved=$((moved + 1))
        echo "MOVED   $file: $(field 4 "$row"): no '$text'"
    fi
done < <(grep '^glue' "$seams")
echo "$moved seams have moved; $relied of the glue were looked at"
((moved == 0))
