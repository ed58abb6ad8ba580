package main

import (
	"maps"
	"slices"
	"strings"
	"testing"
)

// Each line is refused: where a number, a name or shell code is expected, it has a value from outside.
var bad = []string{
	// Arithmetic in all its forms.
	`size=$(jq -r .size file); echo $((size / 2))`,
	`size=$(jq -r .size file); echo $(("$size" / 2))`,
	`size=$(jq -r .size file); echo $((1 + (${size} - 1)))`,
	`size=$(jq -r .size file); ((size > 0))`,
	`read -r size; let "n = $size"`,
	`read -r size; let n=size`,
	`read -r size; [[ $size -eq 0 ]]`,
	`read -r size; [[ 0 -lt "$size" ]]`,
	`read -r size; [[ size -ge 1 ]]`,
	`read -r size; for ((i = 0; i < size; i++)); do :; done`,
	`read -r at; echo "${text:at}"`,
	`read -r at; echo "${text:0:$at}"`,
	`read -r at; echo "${list[at]}"`,
	`read -r at; echo "${list[$at]}"`,
	`read -r at; list[$at]=x`,
	`read -r at; list=([$at]=x)`,
	`f() { echo $(($1 + 1)); }`,
	`f() { [[ $status -eq $1 ]]; }`,
	`((${2-0} == 0))`,
	`(($(wc -l <file) == 1))`,
	`[[ $(wc -l <file) -eq 1 ]]`,
	`echo $((size))`,
	`echo $((${size:-0}))`,
	`n=$size; echo $((n))`,
	`n=${1#x}; echo $((n))`,
	`for n in $(seq 3); do echo $((n)); done`,
	`for n; do echo $((n)); done`,
	`mapfile -t list <file; echo $((list[0]))`,
	`declare -A level=(); ((level[$digest] == 1))`,
	`declare -A level=(); echo $((${level[$digest]} + 1))`,
	`read -r size; let "n = size + 1"`,
	`read -r size; let 'n = size + 1'`,
	`read -r size; [[ 'size + 1' -gt 2 ]]`,
	`for n in *; do echo $((n)); done`,
	`list=(*); echo $((list[0]))`,
	`declare -i n; n=$size`,
	`local -i n=$size`,
	`printf -v n '%s' "$size"; echo $((n))`,
	// A check that checks nothing, or after which the value changes.
	`read -r n; [[ $n =~ ^[0-9]+ ]]; echo $((n))`,
	`read -r n; [[ $n =~ [0-9]+$ ]]; echo $((n))`,
	`read -r n; [[ $n =~ ^[0-9]+|x$ ]]; echo $((n))`,
	`read -r n; [[ $n =~ ^[0-9a-f]+$ ]]; echo $((n))`,
	`read -r n; [[ $n =~ ^.*$ ]]; echo $((n))`,
	`read -r n; [[ $m =~ ^[0-9]+$ ]]; echo $((n))`,
	`read -r n; [[ $n =~ ^[0-9]+$ || -n $m ]] && echo $((n))`,
	`read -r n; [[ ! ($n =~ ^[0-9]+$ && -n $m) ]] || echo $((n))`,
	`read -r n; echo $((n)); [[ $n =~ ^[0-9]+$ ]]`,
	`[[ $n =~ ^[0-9]+$ ]]; read -r n; echo $((n))`,
	`n=0; while ((n < 3)); do read -r n; done`,
	`read -r n; f() { local n; [[ $n =~ ^[0-9]+$ ]]; }; echo $((n))`,
	// Names.
	`unset "job[$pid]"`,
	`command unset "job[$pid]"`,
	`builtin read -r "list[$at]"`,
	`wait -n -p "list[$at]"`,
	`read -r "list[$at]"`,
	`mapfile "$name"`,
	`printf -v "$name" %s x`,
	`[[ -v list[$at] ]]`,
	`test -v "list[$at]"`,
	`declare "$name=1"`,
	`export "$pair"`,
	`local -n ref=$name`,
	`echo "${!name}"`,
	// Shell code.
	`eval "$command"`,
	`eval 'ends 0'`,
	`builtin eval "$command"`,
	`command -p eval "$command"`,
	`. <(jq -r .x file)`,
	`mapfile -C "$command" list`,
	`xargs -I{} sh -c 'echo {}'`,
	`xargs -I NAME sh -c 'echo NAME'`,
	`find . -exec sh -c 'echo {}' \;`,
	`trap "rm $file" EXIT`,
	`sh -c "echo $name"`,
	`bash -ec "echo $name"`,
	`"$BASH" -c "$script"`,
	`xargs -n1 sh -c "echo $name"`,
	`echo "${name@P}"`,
	`printf "$format"`,
	`printf -- "$name: %s" x`,
	// The script of an inner shell is checked, too.
	`sh -c 'echo $(($1 + 1))' sh "$size"`,
}

// good are lines that the lint accepts: the script made the number itself, has checked the value, or uses no number.
var good = []string{
	`n=0; n=$((n + 1)); ((n > 1))`,
	`n=3; while ((n--)); do :; done`,
	`for ((i = 0; i < 3; i++)); do echo "$i"; done`,
	`for n in 1 2 {3..5}; do echo $((n)); done`,
	`a=(); a+=("$1"); ((${#a[@]} > 1))`,
	`(($# == 2 && EUID && $? == 0))`,
	`echo $((RANDOM % 50)) $((${#name} - 1))`,
	`status=0; command || status=$?; ((status == 0))`,
	`command || status=("${PIPESTATUS[@]}"); ((status[0] == 0))`,
	`read -r n; [[ $n =~ ^[0-9]+$ ]] || exit 4; echo $((n))`,
	`read -r n; [[ "$n" =~ ^(0|[1-9][0-9]{0,17})$ ]] || exit 4; echo $((n))`,
	`f() { local n=$1; [[ $n =~ ^[1-9][0-9]?$ ]] && echo $((n)); }`,
	`f() { local n=1; echo $((n)); }; read -r n; echo "$n"`,
	`read -r a b; [[ $a =~ ^[0-9]+$ && $b =~ ^[0-9]+$ ]] || exit 1; ((a == b))`,
	`declare -A level=(); level[$digest]=1; [[ ${level[$digest]} == "$depth" ]]`,
	`args=("$@"); for n in "${!args[@]}"; do echo "${args[n]}"; done`,
	`declare -A job=(); for pid in "${!job[@]}"; do unset 'job[$pid]'; done`,
	`[[ $size == "$offset" ]]`,
	`read -r n; [[ $n =~ ^[0-9]+$ && (-n $m || -n $o) ]] || exit 1; echo $((n))`,
	`read -r n; [[ ! $n =~ ^[0-9]+$ || -z $m ]] && exit 1; echo $((n))`,
	`n=0; let "n = 1 + 2"; declare ""`,
	`find . -exec sh -c 'echo "$1"' sh {} \;`,
	`. ./lib.sh`,
	`test "$(wc -l <file)" -eq "$size"`,
	`echo "${name:1:2}" "${name: -1}"`,
	`for signal in INT TERM; do trap "stop; kill -$signal $$" "$signal"; done`,
	`printf '%s\n' "$name"`,
	`printf -v id '%08x' "$RANDOM"`,
	`script='echo "$1"'; "$BASH" -c "$script" name "$@"`,
	`xargs -d '\n' -n3 sh -c 'echo "$0" "$1"'`,
	`for v in HOME USER; do echo "${!v-}"; done`,
	"# shlint: it is what --dry-run prints\neval \"$1\"",
}

func TestLint(t *testing.T) {
	for _, script := range bad {
		if found := lint(script, true); len(found) == 0 {
			t.Errorf("not refused: %s", script)
		}
	}
	for _, script := range good {
		if found := lint(script, true); len(found) > 0 {
			t.Errorf("refused: %s: %v", script, found)
		}
	}
	if found := lint("# shlint:\neval \"$1\"", true); len(found) == 0 {
		t.Error("an exemption without a reason is one")
	}
	if found := lint("if", true); len(found) == 0 {
		t.Error("a script that does not parse is none")
	}
}

// Shell code is found in every kind of file, with its line.
func TestFiles(t *testing.T) {
	const shell = "read -r n\necho $((n))\n"
	for name, text := range map[string]string{
		"script":   "#!/bin/bash\n#\n" + shell,
		"page.md":  "# EXAMPLES\n\n    read -r n\n    echo $((n))\n",
		"read.md":  "\n```sh\n" + shell + "```\n",
		"s.txtar":  "exec x\n-- x.sh --\n" + shell,
		"t.txtar":  "-- x --\n#!/bin/sh\n" + shell,
		"main.go":  "package main\n\nconst script = `" + shell + "`\n",
		"main2.go": "package main\n\nvar script = \"\" +\n\t\"read -r n; echo $((n))\"\n",
	} {
		found := lintFile(name, text)
		if len(found) == 0 || found[0].line != 3 && name != "main2.go" && name != "page.md" && name != "t.txtar" {
			t.Errorf("%s: %v", name, found)
		}
	}
	for name, text := range map[string]string{
		"page.md": "Text with $((n)).\n\n    {\"a\": \"((\"}\n",
		"x.txtar": "-- x.json --\n{((}\n",
		"main.go": "package main\n\nvar text = \"a (( b\"\n",
	} {
		if found := lintFile(name, text); len(found) > 0 {
			t.Errorf("%s: %v", name, found)
		}
	}
}

// The repository follows the rule, and its files that have shell code are found.
func TestRepository(t *testing.T) {
	files, err := scripts("../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"README.md", "scripts/dist-check-remote", "scripts/dist-run", ".ci/run", "testdata/images/lib.sh", "cmd/snap/main.go"} {
		if _, ok := files["../../"+name]; !ok {
			t.Errorf("%s is not looked at", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		for _, p := range lintFile(name, files[name]) {
			t.Errorf("%s:%d: %s", strings.TrimPrefix(name, "../../"), p.line, p.text)
		}
	}
}
