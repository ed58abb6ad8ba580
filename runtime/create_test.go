package runtime

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"distkit/runtime/internal/testenv"

	"github.com/containerd/errdefs"
)

// If completing a container fails or is cancelled, neither its directory nor its snapshot is left.
func TestCreateUndoes(t *testing.T) {
	testenv.Require(t, "root")
	root, source := t.TempDir(), t.TempDir()
	if err := os.Mkdir(filepath.Join(source, "rootfs"), 0o755); err != nil {
		t.Fatal(err)
	}
	all, err := Open(root, "default", t.TempDir(), bound{source}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var cancel context.CancelFunc
	for what, complete := range map[string]func(*Container) error{
		"failed": func(c *Container) error {
			if !mounted(filepath.Join(c.Dir(), "rootfs")) {
				t.Error("it was completed before it had its files")
			}
			return errdefs.ErrNotFound
		},
		"called off": func(*Container) error { cancel(); return nil },
	} {
		var ctx context.Context
		ctx, cancel = context.WithCancel(t.Context())
		defer cancel()
		_, err := all.Create(ctx, Record{ID: "test-undone", Snapshot: &Snapshot{Key: "k"}}, "parent", complete)
		if !errdefs.IsNotFound(err) && !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", what, err)
		}
		for _, name := range []string{filepath.Join(source, "snapshot-k"), filepath.Join(root, "containers")} {
			if _, err := os.Lstat(name); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s: %s is there: %v", what, name, err)
			}
		}
	}
}

// If the process is killed while it makes a container, Clear or Remove deletes everything it has left.
func TestCreateKilledAtEveryStep(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		for _, step := range []string{"written", "configured", "prepared", "completed"} {
			for _, keep := range []string{"", "yes"} {
				c := m.as("create", "test-made", step)
				c.Env = append(c.Env, "TEST_KEEP="+keep)
				if out, err := c.CombinedOutput(); err == nil {
					t.Fatalf("at %q it was not killed: %s", step, out)
				}
				if keep != "" {
					made, err := m.bound().Get("test-made")
					if err == nil {
						_, err = made.Remove(t.Context(), false)
					}
					if err != nil {
						t.Errorf("killed at %q: %v", step, err)
					}
				} else {
					m.bound().Clear(t.Context())
				}
				for _, name := range []string{filepath.Join(m.bundle, "snapshot-test-made"), filepath.Join(m.state, "store", "containers")} {
					if _, err := os.Lstat(name); !errors.Is(err, os.ErrNotExist) {
						t.Errorf("killed at %q, keep %q: %s is there: %v", step, keep, name, err)
					}
				}
			}
		}
	})
}

// Listing the containers with a process does not open files of the others, of which there may be thousands.
func TestListOpensWhatHasBegunAlone(t *testing.T) {
	t.Parallel()
	state := t.TempDir()
	all, err := Open(t.TempDir(), "default", state, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"begun", "stopped"} {
		c, err := all.Create(t.Context(), Record{ID: id}, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		testenv.Write(t, filepath.Join(c.Dir(), "container.json"), "{") // reading it fails
	}
	if list, err := all.List(true); len(list) != 0 || err != nil {
		t.Errorf("%v, %v", list, err)
	}
	testenv.Write(t, filepath.Join(claimDir(state, "begun"), "state.json"), "{}")
	if _, err := all.List(true); !errdefs.IsFailedPrecondition(err) || strings.Contains(err.Error(), "stopped") {
		t.Errorf("one that has begun: %v", err)
	}
	if _, err := all.List(false); err == nil || !strings.Contains(err.Error(), "stopped") {
		t.Errorf("all: %v", err)
	}
}

// The command is read from the container's configuration. A configuration elsewhere, named by a stranger's record, is
// not opened.
func TestCommand(t *testing.T) {
	t.Parallel()
	all, err := Open(t.TempDir(), "default", t.TempDir(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := all.Create(t.Context(), Record{ID: "c"}, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	const config = `{"ociVersion":"1.0","hooks":{"process":[1]},"process":{"env":[],"args":["sh","-c","a b"]},"linux":`
	for text, want := range map[string][]string{config: {"sh", "-c", "a b"}, "": nil, "[]": nil, `{"process":3}`: nil, `{"process":{"args":{}}}`: nil, `{"root":{}}`: nil} {
		testenv.Write(t, filepath.Join(c.Dir(), "config.json"), text)
		if got := c.Command(); !slices.Equal(got, want) {
			t.Errorf("%s: %q", text, got)
		}
	}
	testenv.Write(t, filepath.Join(c.Dir(), "config.json"), config)
	elsewhere := &Container{Record: Record{ID: "e", Bundle: c.Dir()}, set: all}
	if got := elsewhere.Command(); got != nil {
		t.Errorf("of a stranger's: %q", got)
	}
	elsewhere.own = true
	if got := elsewhere.Command(); len(got) != 3 {
		t.Errorf("of this user's: %q", got)
	}
}
