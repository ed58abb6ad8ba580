package hostile

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"distkit/testdata/fixture"
)

const image = "docker.io/library/redis:latest"

// command is a command to run on a store.
type command struct {
	name    string
	args    []string
	in      string // the name of the file that is its standard input
	runs    bool   // it may make cgroups, and start the processes of the store's containers
	running bool   // it runs while a container runs, whose files are then changed
	left    bool   // it may leave mounts and processes behind, which other commands of the user remove
	passes  bool   // its status may be that of a process that it has run, which need not have printed anything
	fails   bool   // it fails on the unchanged store
	unsure  bool   // it may fail on the unchanged store
}

func (c command) String() string { return c.name + " " + strings.Join(c.args, " ") }

// concerns reports whether a command is likely to read a path of the store.
func (c command) concerns(path string) bool {
	switch c.name {
	case "dist-gc", "dist-run":
		return true
	case "task", "run", "dist-namespace", "run-net":
		return strings.HasPrefix(path, "containers") || c.name == "dist-namespace" && strings.HasPrefix(path, "namespaces") ||
			c.name == "task" && strings.HasPrefix(path, "snapshots")
	case "snap", "dist-unpack":
		return strings.HasPrefix(path, "snapshots") || c.name == "dist-unpack" && !strings.HasPrefix(path, "containers")
	}
	return !strings.HasPrefix(path, "containers") && !strings.HasPrefix(path, "snapshots")
}

// script makes a store with objects of every kind, and, outside it, an archive, a layer and a file with one letter.
const script = `
	{
	dist-pull -q "$image"
	dist-namespace create ci team=core
	dist-image --namespace ci create docker.io/library/redis:ci "$(dist-image target "$image" | cut -f1)"
	manifest=$(dist-image manifest -q "$image")
	config=$(dist-cat "$manifest" | jq -r .config.digest)
	layer=$(dist-cat "$manifest" | jq -r '.layers[0].digest')
	dist-label "$layer" use=base
	head -c 1000 /dev/zero | dist-ingest --expected-size 2000 --keep partial 2>/dev/null || true
	for CONTAINERD_SNAPSHOTTER in $drivers; do
		export CONTAINERD_SNAPSHOTTER
		if ((EUID)); then # the files would be those of subordinate IDs
			chain=$(dist-image chain "$image" | cut -f1)
			snap prepare first
			snap commit "$chain" first
		else
			chain=$(dist-unpack "$image")
		fi
		snap prepare work "$chain"
		snap prepare alone
	done
	for c in "$id" "$id.sleeps"; do
		if ((EUID)); then
			bundle=$(task create --label a=b "$c")
		else
			bundle=$(task create --label a=b --snapshot "$c" --parent "$chain" "$c")
			umount "$bundle/rootfs"
		fi
		dist-image config "$image" | run-spec --user 0 -- true >"$bundle/config.json"
		[[ $c == "$id" ]] || sed -i 's/"true"/"sleep","1000s"/' "$bundle/config.json"
	done
	if [[ -n $run ]]; then
		task start "$id"
		task wait "$id"
	fi
	dist-export "$image" >archive
	dist-cat "$layer" >layer
	printf x >letter
	} >/dev/null
	echo "$config" "$manifest" "$(dist-image target "$image" | cut -f1)" "$layer" "$chain"`

// prepare makes the store, and the commands to run on copies of it.
func (s *stage) prepare(t *testing.T) {
	const letter = "sha256:2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881" // the digest of "x"
	drivers, run := []string{"native"}, ""
	if fixture.Has("overlay") {
		drivers = append(drivers, "overlayfs") // the container's driver comes last
	}
	root := s.uid == 0
	canRun := root && fixture.Has("runc")
	if canRun {
		run = "yes"
	}
	c := exec.Command("bash", "-euo", "pipefail", "-c", script)
	c.Dir, c.Env = s.pristine, append(s.env, "image="+image, "drivers="+strings.Join(drivers, " "), "run="+run, "id="+s.id)
	var errs bytes.Buffer
	c.Stderr = &errs
	out, err := c.Output()
	if err != nil {
		t.Fatalf("prepare a store: %v\n%s", err, errs.String())
	}
	words := strings.Fields(string(out))
	if len(words) != 5 {
		t.Fatalf("prepare a store: %q", out)
	}
	s.image, s.drivers = slices.Compact(words[:3]), drivers
	config, manifest, layer, chain := words[0], words[1], words[3], words[4]
	text, err := os.ReadFile(filepath.Join(s.pristine, ".content", blob(manifest)))
	if err != nil {
		t.Fatal(err)
	}
	descriptor := fmt.Sprintf(`{"mediaType":"application/vnd.docker.distribution.manifest.v2+json","digest":%q,"size":%d}`, manifest, len(text))
	if err := os.WriteFile(filepath.Join(s.pristine, "descriptor"), []byte(descriptor), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(s.pristine, "target"), 0o755); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(commands, "\n")
	for _, driver := range drivers {
		for _, line := range strings.Split(snapCommands, "\n") {
			lines = append(lines, strings.Replace(line, "snap ", "snap --snapshotter "+driver+" ", 1))
		}
	}
	values := strings.NewReplacer("MANIFEST", manifest, "CONFIG", config, "LAYER", layer, "CHAIN", chain, "LETTER", letter, "IMAGE", image, "ID", s.id)
	for _, line := range lines {
		line, marks, _ := strings.Cut(values.Replace(line), " #")
		line, in, _ := strings.Cut(line, " <")
		words := strings.Fields(line)
		marked := func(word string) bool { return slices.Contains(strings.Fields(marks), word) }
		if len(words) == 0 || marked("running") && s.owner != s.uid || (marked("run") || marked("running")) && !canRun {
			continue
		}
		if words[0] == "bash" {
			words = []string{"bash", "-o", "pipefail", "-c", strings.TrimPrefix(line, "bash ")}
		}
		s.commands = append(s.commands, command{
			name: words[0], args: words[1:], in: in,
			runs: marked("run") || marked("running"), running: marked("running"), left: marked("left") || marked("running"),
			passes: marked("passes"),
			fails:  marked("fails") || marked("root") && !root || marked("ran") && !canRun, unsure: marked("unsure"),
		})
	}
}

// commands are the commands and verbs that read a store. "<FILE" is the standard input. The words after " #" say
// whether the command makes cgroups (run), is for a container that runs (running), may leave mounts or processes
// (left), or passes on the exit status of a process (passes); and whether it fails on the unchanged store: for
// everybody (fails), for all users except root (root), where no container has run (ran), or perhaps (unsure).
const commands = `
dist-list
dist-list --json
dist-path LAYER
dist-cat CONFIG
dist-label LAYER
dist-label LAYER a=b
dist-delete LAYER
dist-verify
dist-verify --delete
dist-active
dist-abort partial
dist-events
dist-gc --dry-run --grace 0
dist-gc --grace 0
dist-image ls
dist-image check IMAGE
dist-image check --unpacked IMAGE
dist-image config IMAGE
dist-image chain --config IMAGE
dist-image layers IMAGE
dist-image children MANIFEST
dist-image manifest IMAGE
dist-image target IMAGE
dist-image label IMAGE a=b
dist-image create other MANIFEST
dist-image create other - <descriptor
dist-image update --target MANIFEST IMAGE
dist-image rm IMAGE
dist-image sources IMAGE docker.io/library/redis
dist-namespace ls
dist-namespace create new
dist-namespace label ci a=b
dist-namespace rm ci #fails
dist-image --namespace ci ls
dist-image --namespace ci rm docker.io/library/redis:ci
dist-import <archive
dist-import --root other --name copy <archive
dist-export IMAGE
dist-export --all-platforms IMAGE #fails
dist-hold -- true #passes
dist-ingest partial <letter
dist-ingest --expected-digest LETTER <letter
dist-edit LAYER
dist-put ./.content LETTER <letter
dist-fetch ./.content CONFIG
dist-fetch ./.content IMAGE
dist-resolve ./.content IMAGE
dist-tags ./.content
dist-referrers ./.content MANIFEST
dist-untag ./.content IMAGE
dist-copy-graph --root copy --from-root .content --referrers --tag x MANIFEST
dist-copy-graph --from-root .content --tag x MANIFEST
bash FROM=./.content dist-copy-graph --root copy --referrers --from 'exec dist-fetch --batch "$FROM"' --tag x MANIFEST
bash TO=./copy dist-copy-graph --referrers --to 'exec dist-put --batch "$TO"' --tag x MANIFEST
dist-pull -q ./.content:IMAGE
dist-pull -q IMAGE
dist-push -q --platform local IMAGE ./copy:x
dist-unpack IMAGE #root
bash dist-cat LAYER | dist-apply target
bash dist-image config IMAGE | run-spec --user 0
run-net ls
run-net path ID
run-net del ID
task ls -a
task info ID
task ps ID #fails
task stats ID #fails
task logs ID
task logs -f ID #ran
task attach --no-stdin ID #fails passes
task wait ID #ran passes
task label ID a=b
task kill ID #fails
task pause ID #fails
task checkpoint ID #fails
task restore ID MANIFEST #run left fails
task rm -f ID #passes
task rm ID #passes
task trust ID
task create newID
task create --image IMAGE --digest MANIFEST newID
task create --parent CHAIN --snapshot k newID #left root
task create --checkpoint MANIFEST newID #fails
task exec ID true #run fails passes
task start ID #run left
run .content/containers/default/ID #run passes
dist-run --rm --pull never --id newID IMAGE true #run passes
dist-run --detach --pull never --id newID IMAGE true #run left
task ls #running
task info ID.sleeps #running
task ps ID.sleeps #running
task stats ID.sleeps #running
task logs ID.sleeps #running
task exec ID.sleeps tiny true #running passes
task exec --detach ID.sleeps tiny true #running
task pause ID.sleeps #running
task update --pids 10 ID.sleeps #running
task start ID.sleeps #running fails
task kill ID.sleeps #running
task rm ID.sleeps #running fails
task rm -f ID.sleeps #running passes`

// snapCommands are the commands that run once for each driver.
const snapCommands = `
snap ls
snap tree
snap stat work
snap usage
snap mounts work
snap mount work target #left root
snap prepare new CHAIN
snap prepare --mount target new CHAIN #left root
snap view new CHAIN
snap commit new work
snap commit new alone
snap stack --parent CHAIN -- true <letter #unsure
snap label work a=b
snap rm work
snap rm CHAIN #fails`
