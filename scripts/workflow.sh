# workflow.sh: the shared part of dist-pull, dist-push, dist-copy, dist-unpack, dist-commit, dist-mutate and dist-run. Each sets self and sources this file, which is in
# the same directory. All but dist-run set usage, about and flags before, and call options with their arguments.
# shellcheck shell=bash
# shellcheck disable=SC2154 # usage, about and flags
# A closed standard stream is replaced by /dev/null, opened so that using it fails. Descriptor 2 is the script itself if bash found it closed.
[[ -e /dev/fd/0 ]] || exec 0>/dev/null
[[ -e /dev/fd/1 ]] || exec 1</dev/null
[[ -e /dev/fd/2 && ! /dev/fd/2 -ef $0 ]] || exec 2</dev/null
version=devel
[[ $self == /* ]] || self=$PWD/$self
PATH=${self%/*}/../libexec/distkit:${self%/*}:$PATH

# The flags of commands that talk to remotes.
# shellcheck disable=SC2034 # for scripts
remote='
      --auth-file FILE     take credentials from FILE, in the form of docker'\''s config.json (env REGISTRY_AUTH_FILE)
      --ca FILE            trust the authorities in FILE, too; may be repeated (env DIST_CA)
  -v, --debug              show each request, without secrets, on standard error (env DIST_DEBUG)
      --header @FILE       send the header lines of FILE to the registry (env DIST_HEADERS)
      --hosts-dir DIR      the directory of hosts.toml files (env DIST_HOSTS_DIR)
      --insecure           take certificates without verifying them (env DIST_INSECURE)
      --max-wait DURATION  wait at most DURATION when a registry asks to (env DIST_MAX_WAIT)
      --plain-http         plain HTTP instead of HTTPS (env DIST_PLAIN_HTTP)
      --remote-path DIR    the directory of the commands on a machine of ssh:: (env DIST_REMOTE_PATH)
      --timeout DURATION   give up a host that sends nothing for DURATION (env DIST_TIMEOUT)'
fail() { # STATUS MESSAGE
	printf '%s: %s\n' "${self##*/}" "$2" >&2 || true
	exit "$1"
}

misused() { fail 2 "$1; usage: $usage"; }

# options parses the flags, which the help text in flags defines, and the operands. It sets option to each flag's value, or to yes if the flag takes
# none. The values of a flag that may be repeated are lines. A flag with an environment variable is exported as that. It sets operands to the
# operands, and graph to the dist-copy-graph command with the flags that the script hands on.
declare -A option=()
operands=() input=''
# shellcheck disable=SC2034
options() { # [ARG…]
	local flag name line takes value exports=()
	given=("$@")
	flags+='
  -h, --help               print this help and exit
  -x, --trace              print each step on standard error as it is taken, as a line for the shell
      --version            print the version and exit'
	[[ ${1-} != __complete* ]] || { candidates "${@:2}" && exit; }
	while [[ ${1-} == -?* && $1 != -- ]]; do
		if [[ $1 == -[!-]?* && $flags =~ $'\n  '"${1:0:2}"', --'[a-z-]+(' '[^\ ])? ]]; then
			# The value is in the same word, or other flags are.
			name=${1:2}
			[[ -n ${BASH_REMATCH[1]} ]] || name=-$name
			set -- "${1:0:2}" "$name" "${@:2}"
		fi
		flag=${1%%=*} name=''
		[[ $1 != -? || ! $flags =~ $'\n  '"$1"', --'([a-z-]+) ]] || name=${BASH_REMATCH[1]}
		[[ $flag != --+([a-z-]) ]] || name=${flag#--}
		line=$'\n  (-., |    )--'$name$'( [^ ]+|\\[=[^ ]+\\]|)  ([^\n]*)'
		[[ -n $name && $flags =~ $line ]] || misused "unknown flag: $flag"
		takes=${BASH_REMATCH[2]} line=${BASH_REMATCH[3]} value=yes
		if [[ $1 == *=* ]]; then
			[[ -n $takes ]] || misused "flag takes no argument: $flag"
			value=${1#*=}
		elif [[ $takes == \[* ]]; then
			value=all
		elif [[ -n $takes ]]; then
			value=${2-}
			shift $(($# > 1))
		fi
		[[ -n $value ]] || misused "flag needs an argument that is not empty: $flag"
		shift
		case $name in
		help) printf '%s\n\nUsage:\n  %s\n\nFlags:\n' "$about" "$usage" && sort -k1.9 <<<"${flags#$'\n'}" && exit ;;
		version) printf '%s version %s\n' "${self##*/}" "$version" && exit ;;
		header) [[ $value == @?* ]] || misused '--header wants @FILE, so that no list of processes shows it' && value=${value#@} ;;
		esac
		[[ $line != *'may be repeated'* || -z ${option[$name]-} ]] || value=${option[$name]}$'\n'$value
		option[$name]=$value
		[[ -n $takes ]] || value=1
		[[ $name != ca ]] || value=${DIST_CA:+$DIST_CA:}${value//$'\n'/:}
		[[ ! $line =~ '(env '([A-Z_]+)')' ]] || exports+=("${BASH_REMATCH[1]}=$value")
	done
	[[ ${1-} != -- ]] || shift
	operands=("$@")
	for value in "$@"; do [[ -n $value ]] || misused 'an operand is empty'; done
	[[ -z ${exports[*]-} ]] || step export "${exports[@]}"
	[[ ${option[jobs]:=8} =~ ^[1-9][0-9]?$ ]] || fail 2 "--jobs wants a number from 1 to 99, got '${option[jobs]}'"
	graph=(dist-copy-graph --jobs "${option[jobs]}" ${option[quiet]:+--quiet} ${option[referrers]:+"--referrers=${option[referrers]}"}
		${option[verify]:+"--verify=${option[verify]}"})
}

# candidates prints the flags that complete the last argument, for the completion scripts of the shells, in the form that cobra's commands print
# them in: a tab before the description, and at the end :4 for flags alone, or :0 for files.
candidates() { # [ARG…]
	local - IFS=$'\n' pattern='^  (-(.),|   ) --([a-z-]+)( [^ ]+|\[=[^ ]+\])?  ' word=${*: -1} before='' value='' line list='' directive=:4
	set -f # $flags is split into lines, and a [=TYPE…] in it is no pattern
	for line in "${@:1:$#-1}"; do # The names are those of the store and the namespace that the flags before name.
		[[ $line != --@(root|namespace)=* ]] || before=${line%%=*}
		case $before in
		--root) export DIST_ROOT="${line#--root=}" ;;
		--namespace) export CONTAINERD_NAMESPACE="${line#--namespace=}" ;;
		esac
		before=$line
	done
	[[ $word == -* && $word != *=* ]] || directive=:0
	for line in $flags; do
		[[ $line =~ $pattern ]] || continue
		# Behind a flag that takes a value comes that.
		[[ ${BASH_REMATCH[4]} != ' '* || ($before != "--${BASH_REMATCH[3]}" && $before != "-${BASH_REMATCH[2]}") ]] || directive=:0 value=yes
		line=${line#"${BASH_REMATCH[0]}"}
		[[ --${BASH_REMATCH[3]} != "$word"* ]] || list+=--${BASH_REMATCH[3]}$'\t'${line#"${line%%[! ]*}"}$'\n'
	done
	[[ $directive == :0 ]] || printf %s "$list"
	# Names of a store may be a stranger's, and bash expands what a completion script is given: only what is a plain word is offered.
	if [[ $directive == :0 && -z $value && $usage == *NAME* ]]; then
		LC_ALL=C dist-image ls -q 2>/dev/null | LC_ALL=C grep -E "^[A-Za-z0-9][A-Za-z0-9./:@_+-]*$" | grep -F -e "$word" | head -n 500 || true
	fi
	printf '%s\n' "$directive"
}

# registry reports whether a locator names a registry, not a directory or a helper's remote.
registry() { [[ $1 != [./]* && $1 != *::* ]]; } # LOCATOR

# show prints a step if --trace is set. If input is set, it is the step's standard input and printed too.
show() { # COMMAND [ARG…]
	[[ -n ${option[trace]-} ]] || return 0
	printf -v traced ' %q' "$@"
	printf '%s\n' "${traced# }${input:+ <<<${input@Q}}" >&2
}

step() { show "$@" && "$@"; } # COMMAND [ARG…]

# become takes the last step: its command takes the place of the script.
become() { show "$@" && exec "$@"; } # COMMAND [ARG…]

# hold protects blobs that have no name yet from a sweep: dist-hold takes the lock and runs the script again, in the same process.
hold() { [[ ${DIST_HELD-} == "$$" ]] || DIST_HELD=$$ exec dist-hold --classed "$@" -- "$BASH" "$self" "${given[@]}"; } # [FLAG…]

# keep copies a file that can be read only once, such as <(command), to an unlinked file, because several processes read it. It sets kept to the path to
# use.
keep() { # FILE
	local secret
	kept=$1
	[[ -e $1 && (! -f $1 || $1 == /dev/*) ]] || return 0
	kept=$(mktemp -p "${XDG_RUNTIME_DIR:-/dev/shm}" 2>/dev/null || mktemp)
	exec {secret}<>"$kept"
	rm -- "$kept"
	cat -- "$1" >&"$secret"
	kept=/dev/fd/$secret
}

# secrets keeps the files that hold credentials.
secrets() {
	keep "${REGISTRY_AUTH_FILE-}"
	[[ -z $kept ]] || export REGISTRY_AUTH_FILE=$kept
	keep "${DIST_HEADERS-}"
	[[ -z $kept ]] || export DIST_HEADERS=$kept
}

# The running processes that start has started. They are ended with the script, also if a signal ends it.
children=()
stop() { ((${#children[@]} == 0)) || { kill -TERM "${children[@]}" && wait "${children[@]}"; } 2>/dev/null || true; }
end() { stop; } # which a script may extend

# begin starts a command and sets output to the descriptor to read its output from. It does not use <(…), because bash no longer knows that such a
# process is its child when a signal ends the script.
begin() { # COMMAND [ARG…]
	local pipe
	exec {pipe}<> <(:)
	exec {output}<"/dev/fd/$pipe"
	start "$@" >&"$pipe" {pipe}>&- {output}<&-
	exec {pipe}>&-
}

# start starts a command in the background, with input as its standard input if that is set.
start() { # COMMAND [ARG…]
	trap end EXIT
	show "$@"
	# <<< would write a long text to a temporary file.
	if [[ -n ${input-} ]]; then "$@" < <(printf '%s\n' "$input") & else "$@" <&0 & fi
	children+=("$!")
}

# answers waits for the command that begin started last, and exits with its status if it fails. It sets answer to the lines of its output.
# shellcheck disable=SC2034
answers() {
	mapfile -t answer <&"$output"
	exec {output}<&-
	await
}

# run runs a command and waits for it. Unlike a foreground command, it does not delay the script's reaction to a signal.
run() { start "$@" && await; } # COMMAND [ARG…]

# await waits for the child that was started last, and exits with its status if it fails.
await() { child || exit; }

# child waits for the child that was started last, and returns its status.
child() {
	local status=0
	wait "${children[-1]}" || status=$?
	unset 'children[-1]'
	return "$status"
}

# derive makes an image from the one with the manifest DIGEST, and sets derived to the new manifest's digest. The image gets the layers that the lines
# of $scratch/layers describe, in the form of dist-diff --descriptor, and the config that the PROGRAM for jq makes. The history gets an entry for what
# was done only if it has one for each layer that was there. The blobs are stored under references that begin with $ref.
# shellcheck disable=SC2016,SC2034
derive() { # DIGEST PROGRAM [FLAG…]
	run dist-image config -- "$1" >"$scratch/config"
	run dist-cat -- "$1" >"$scratch/manifest"
	store config 'if .rootfs | type != "object" then error("this is not the config of an image") else . end |
		(env.SOURCE_DATE_EPOCH // "" | if . == "" then now else tonumber end | floor | todate) as $now |
		([.history[]? | select(.empty_layer | not)] | length) as $told | if $told == (.rootfs.diff_ids | length) then .history +=
			[({created: $now, created_by: $by} + ({author: $author, comment: $message} | with_entries(select(.value != "")))) as $done |
			if $layers == [] then $done + {empty_layer: true} else $layers[] | $done end] else . end |
		.rootfs.diff_ids += [$layers[].diffID] | .created = $now | del(.container, .container_config) | '"$2" \
		--arg by "${self##*/}" --arg author "${option[author]-}" --arg message "${option[message]-}" "${@:3}"
	IFS=$'\t' read -r config size <<<"$stored"
	store manifest '(.mediaType // "" | startswith("application/vnd.docker.")) as $docker | .config += {digest: $config, size: $size} | del(.subject) |
		.layers += [$layers[] | {mediaType, digest, size} |
			if $docker then .mediaType |= "application/vnd.docker.image.rootfs.diff.tar." + (split("+") | last) else . end]' \
		--arg config "$config" --argjson size "$size"
	derived=${stored%%$'\t'*}
}

# store stores what jq makes of $scratch/config or $scratch/manifest, and sets stored to its digest and size.
store() { # config|manifest PROGRAM [FLAG…]
	input=$(jq -c --slurpfile layers "$scratch/layers" "${@:3}" "$2" "$scratch/$1" 2>"$scratch/said") || fail 2 "$1: $(head -n1 "$scratch/said")"
	begin dist-ingest "$ref/$1"
	answers
	input='' stored=${answer[0]}
}
