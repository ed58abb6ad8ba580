package runtime

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"distkit/runtime/internal/testenv"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
)

// criu puts a criu on PATH that prints a text and exits with a status.
func criu(t *testing.T, says string, status string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "criu"), []byte("#!/bin/sh\necho '"+says+"' >&2\nexit "+status+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// checkpointing is a runc that stores a word instead of the processes' state, and restores by starting anew.
const checkpointing = `#!/bin/bash
set -eu
args=() images='' verb=''
while (($#)); do
	case $1 in
	checkpoint | restore) verb=$1 ;;
	--image-path) images=$2 && shift ;;
	--work-path) shift ;;
	--leave-running | --tcp-established | --ext-unix-sk | --file-locks | --shell-job) [[ -n $verb ]] || exit 3 ;;
	*) args+=("$1") ;;
	esac
	shift
done
case $verb in
checkpoint)
	id=${args[-1]}
	test "$(runc "${args[@]:0:${#args[@]}-1}" state "$id" | grep -o '"status": "paused"')" # or else it moves
	echo "$id" >"$images/inventory.img" ;;
restore)
	test -s "$images/inventory.img"
	for n in "${!args[@]}"; do [[ ${args[n]} != --detach ]] || break; done
	exec runc "${args[@]:0:n}" run "${args[@]:n}" ;;
*) exec runc "${args[@]}" ;;
esac
`

func TestCheckpoint(t *testing.T) {
	for _, p := range []string{"root", "runc", "busybox", "bash"} {
		testenv.Require(t, p)
	}
	criu(t, "Looks good.", "0")
	name := filepath.Join(t.TempDir(), "runc")
	if err := os.WriteFile(name, []byte(strings.ReplaceAll(checkpointing, "runc ", "/usr/sbin/runc ")), 0o755); err != nil {
		t.Fatal(err)
	}
	m := newMachine(t, name)
	m.spec(spec.Options{Args: []string{"sh", "-c", "while :; do sleep 0.02; done"}})
	c := m.detached(Record{ID: "test-checkpoint"})
	images := t.TempDir()
	save := func() error {
		if i := m.info(c); i.Status != Paused {
			t.Errorf("while it is stored it is %s", i.Status)
		}
		if _, err := os.Stat(filepath.Join(images, "inventory.img")); err != nil {
			t.Error(err)
		}
		return nil
	}
	if err := c.Checkpoint(t.Context(), images, false, save); err != nil {
		t.Fatal(err)
	}
	if i := m.info(c); i.Status != Running {
		t.Errorf("then it is %s", i.Status)
	}
	// If saving fails, the container continues.
	if err := c.Checkpoint(t.Context(), images, true, func() error { return os.ErrInvalid }); err == nil || m.info(c).Status != Running {
		t.Errorf("%v, %s", err, m.info(c).Status)
	}
	if err := c.Checkpoint(t.Context(), images, true, save); err != nil {
		t.Fatal(err)
	}
	if i := m.stopped(c); i.Exit.Status == nil || *i.Exit.Status != 137 {
		t.Errorf("%+v", i.Exit)
	}
	again, err := m.containers().Create(t.Context(), Record{ID: "test-restored", Bundle: c.Bundle}, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	again.FromCheckpoint()
	if _, err := again.Start(t.Context(), m.find()); err == nil {
		t.Error("restored from nothing")
	}
	if err := os.CopyFS(again.CheckpointDir(), os.DirFS(images)); err != nil {
		t.Fatal(err)
	}
	if pid, err := again.Start(t.Context(), m.find()); err != nil || m.info(again).Pid != pid {
		t.Errorf("%d %v", pid, err)
	}
	for _, c := range []*Container{c, again} {
		if _, err := c.Remove(t.Context(), true); err != nil {
			t.Error(err)
		}
	}

	// A container that could not be restored is not ended by a checkpoint.
	m.spec(spec.Options{PID: "host", UTS: "host", Args: []string{"sleep", "1000"}})
	shared := m.detached(Record{ID: "test-shared"})
	if err := shared.Checkpoint(t.Context(), images, true, save); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "pid namespace, another uts") || m.info(shared).Status != Running {
		t.Errorf("namespaces of the host: %v, %s", err, m.info(shared).Status)
	}
	if _, err := shared.Remove(t.Context(), true); err != nil {
		t.Error(err)
	}

	// An input from outside can't be stored.
	m.spec(spec.Options{Args: []string{"sleep", "1000"}})
	fed := m.detached(Record{ID: "test-fed", Interactive: true})
	if err := fed.Checkpoint(t.Context(), images, false, save); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("interactive: %v", err)
	}
	if _, err := fed.Remove(t.Context(), true); err != nil {
		t.Error(err)
	}
	for log, want := range map[string]string{
		"": "", "(00.01) Warn (criu/a.c:1): x\n(00.02) Error (criu/util.c:1534): rlimit: Can't setup\n(00.03) Error (criu/b.c:2): first\n(00.04) Error (criu/c.c:3): second\n": "Error (criu/b.c:2): first",
	} {
		if got := criuError([]byte(log)); got != want {
			t.Errorf("of %q: %q", log, got)
		}
	}

	criu(t, "Error (criu/x.c:1): no such feature", "1")
	if err := CheckCriu(t.Context()); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "no such feature") {
		t.Errorf("%v", err)
	}
	m.clean()
}
