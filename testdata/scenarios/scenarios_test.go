// Package scenarios runs the commands as a user does: scripts (*.txtar), the README's blocks, and the man pages'
// examples. Each has a registry of its own.
package scenarios

import (
	"errors"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"distkit/testdata/fixture"
	"distkit/testdata/registry/faults"
)

var update = flag.Bool("update", false, "rewrite what the scripts compare with, where it differs")

func TestMain(m *testing.M) { fixture.Main(m) }

// TestScripts runs the *.txtar files here. Besides testscript's own commands there are
//
//	status N CMD…         the command ends with exactly that status (signals: 128+n)
//	oneline NAME          standard error of the last command is one line that begins "NAME: "
//	waitfile PATTERN…     waits until each pattern matches a file
//	fault KIND[=ARG] …    the registry misbehaves (package faults); unfault ends it
//	requests KIND OP N    compares a count of requests: blobs.get, manifests.bytes, … with
//	                      ==, <, >; `requests reset` begins again
//
// and the conditions root, overlay, tmpfs, userns and those of programs. $REGISTRY is the
// registry's host:port, $REGISTRY_DIR what it serves (see testdata/images/tiny.sh), and
// docker.io is mapped to it.
func TestScripts(t *testing.T) {
	if _, err := fixture.Images(); err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 ".",
		WorkdirRoot:         fixture.Dir,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       *update,
		Setup: func(env *testscript.Env) error {
			// The test's own directories are outside those that a script lists.
			dir := filepath.Join(env.WorkDir, ".world")
			w, err := fixture.NewWorld(dir)
			if err != nil {
				return err
			}
			env.Defer(func() {
				w.Close()
				removeContainers(t, env)
				if err := fixture.Unmount(env.WorkDir); err != nil {
					t.Error(err)
				}
				if err := os.RemoveAll(env.WorkDir); err != nil {
					t.Error(err)
				}
			})
			for _, v := range w.Vars {
				name, value, _ := strings.Cut(v, "=")
				env.Setenv(name, value)
			}
			env.Values[worldKey{}] = w
			return nil
		},
		Condition: func(name string) (bool, error) { return fixture.Has(name), nil },
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status":   status,
			"oneline":  oneline,
			"waitfile": waitfile,
			"fault":    fault,
			"unfault":  unfault,
			"requests": requests,
		},
	})
}

type worldKey struct{}

func world(ts *testscript.TestScript) *fixture.World {
	return ts.Value(worldKey{}).(*fixture.World)
}

func status(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status N CMD…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		ws := exit.Sys().(syscall.WaitStatus)
		if got = ws.ExitStatus(); ws.Signaled() {
			got = 128 + int(ws.Signal())
		}
	}
	if got != want {
		ts.Fatalf("status %d, not %d", got, want)
	}
}

func oneline(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: oneline NAME")
	}
	text := ts.ReadFile("stderr")
	if !strings.HasPrefix(text, args[0]+": ") || strings.Count(text, "\n") != 1 || !strings.HasSuffix(text, "\n") {
		ts.Fatalf("standard error is not one line that begins %q: %q", args[0]+": ", text)
	}
}

func waitfile(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: waitfile PATTERN…")
	}
	for _, pattern := range args {
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
			found, err := filepath.Glob(ts.MkAbs(pattern))
			ts.Check(err)
			if len(found) > 0 {
				break
			}
			if time.Now().After(deadline) {
				ts.Fatalf("%s did not appear", pattern)
			}
		}
	}
}

func fault(ts *testscript.TestScript, neg bool, args []string) {
	f, err := faults.Parse(strings.Join(args, " "))
	ts.Check(err)
	if neg {
		ts.Fatalf("usage: fault KIND[=ARG] [path=PIECE] [times=N]")
	}
	world(ts).Add(f)
}

func unfault(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: unfault")
	}
	world(ts).Clear()
}

func requests(ts *testscript.TestScript, neg bool, args []string) {
	if !neg && len(args) == 1 && args[0] == "reset" {
		world(ts).Reset()
		return
	}
	if neg || len(args) != 3 {
		ts.Fatalf("usage: requests reset | requests KIND.(get|head|write|bytes) (==|<|>) N")
	}
	kind, field, _ := strings.Cut(args[0], ".")
	c, ok := world(ts).Stats()[kind]
	got, known := map[string]int64{"get": int64(c.Get), "head": int64(c.Head), "write": int64(c.Write), "bytes": c.Bytes}[field]
	if !ok || !known {
		ts.Fatalf("requests: no such count: %s", args[0])
	}
	want, err := strconv.ParseInt(args[2], 10, 64)
	ts.Check(err)
	holds := map[string]bool{"==": got == want, "<": got < want, ">": got > want}[args[1]]
	if !holds {
		for _, r := range world(ts).Log() {
			ts.Logf("%s %s %s: %d, %d bytes %s", r.Method, r.Path, r.Range, r.Status, r.Bytes, r.Fault)
		}
		ts.Fatalf("%s is %d, not %s %d", args[0], got, args[1], want)
	}
}

// removeContainers removes the containers that a failed script has left, because their IDs are used on the whole host.
func removeContainers(t *testing.T, env *testscript.Env) {
	left, err := filepath.Glob(filepath.Join(env.WorkDir, "*/containers/*/*"))
	if err != nil {
		t.Error(err)
	}
	for _, dir := range left {
		namespace := filepath.Dir(dir)
		c := exec.Command("task", "rm", "--force", "--root", filepath.Dir(filepath.Dir(namespace)), "--namespace", filepath.Base(namespace), filepath.Base(dir))
		c.Env = env.Vars
		if out, err := c.CombinedOutput(); err != nil {
			t.Logf("%s: %v: %s", dir, err, out)
		}
	}
}
