package runtime

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"distkit/runtime/internal/testenv"
	"distkit/runtime/spec"
	"distkit/runtime/stdio"
)

// A process started by task exec leaves another one, which continues to print. All of the output is in the log.
func TestExecLeavesOneThatPrints(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"sleep", "1000"}})
		c := m.detached(Record{ID: "test-leaves"})
		const script = "(sleep 3; i=0; while [ $i -lt 5000 ]; do echo a line of some length $i; i=$((i+1)); done) & exit 4"
		id, err := c.StartExec(t.Context(), Exec{Args: []string{"sh", "-c", script}})
		if err != nil {
			t.Fatal(err)
		}
		e, err := c.proc(id).Wait(t.Context())
		if err != nil || e.Status == nil || *e.Status != 4 {
			t.Fatalf("%+v, %v", e, err)
		}
		until(t, "the last line", func() bool {
			var text bytes.Buffer
			err := c.proc(id).Logs(t.Context(), Logs{Tail: -1}, func(e stdio.Entry) error { text.Write(e.Text); return nil })
			return err == nil && strings.HasSuffix(text.String(), " 4999\n") && strings.Count(text.String(), "\n") == 5000
		})
		if _, err := c.Remove(t.Context(), true); err != nil {
			t.Error(err)
		}
	})
}

// printed returns the output of a container.
func printed(t *testing.T, c *Container) (text string) {
	t.Helper()
	if err := c.proc("").Logs(t.Context(), Logs{Tail: -1}, func(e stdio.Entry) error { text += string(e.Text); return nil }); err != nil {
		t.Fatal(err)
	}
	return text
}

// The log of a crashed run still exists when the container runs again.
func TestRestartKeepsTheLog(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"sh", "-c", "echo crashed; exit 3"}})
		c := m.detached(Record{ID: "test-again"})
		m.stopped(c)
		if _, err := c.Start(t.Context(), m.find()); err != nil {
			t.Fatal(err)
		}
		m.stopped(c)
		if got := printed(t, c); got != "crashed\ncrashed\n" {
			t.Errorf("the log is %q", got)
		}
		if _, err := c.Remove(t.Context(), false); err != nil {
			t.Error(err)
		}
	})
}

// The record of an end distinguishes a kill by the OOM killer from any other.
func TestOutOfMemory(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		for script, want := range map[string]bool{"x=0123456789abcdef; while :; do x=$x$x; done": true, "kill -9 $$; exit 137": false} {
			m.spec(spec.Options{Args: []string{"sh", "-c", script}, Limits: spec.Limits{Memory: 32 << 20}})
			c := m.detached(Record{ID: "test-memory"})
			m.stopped(c)
			i, err := c.Info()
			if err != nil {
				t.Fatal(err)
			}
			if i.Exit.Status == nil || *i.Exit.Status != 137 || i.Exit.OOMKilled != want {
				t.Errorf("%q: %+v", script, i.Exit)
			}
			if _, err := c.Remove(t.Context(), false); err != nil {
				t.Error(err)
			}
		}
	})
}

// More callers can wait for a container than a user has inotify instances.
func TestManyWait(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		m.spec(spec.Options{Args: []string{"sh", "-c", "while ! test -e /go; do sleep 0.01; done; exit 6"}})
		c := m.detached(Record{ID: "test-awaited"})
		var waiting, done sync.WaitGroup
		for range 200 {
			waiting.Add(1)
			done.Go(func() {
				waiting.Done()
				if e, err := c.proc("").Wait(t.Context()); err != nil || e.Status == nil || *e.Status != 6 {
					t.Errorf("%+v, %v", e, err)
				}
			})
			done.Go(func() {
				if err := c.proc("").Logs(t.Context(), Logs{Follow: true, Tail: -1}, func(stdio.Entry) error { return nil }); err != nil {
					t.Error(err)
				}
			})
		}
		waiting.Wait()
		testenv.Write(t, filepath.Join(m.bundle, "rootfs/go"), "")
		done.Wait()
		if err := os.Remove(filepath.Join(m.bundle, "rootfs/go")); err != nil {
			t.Error(err)
		}
		if _, err := c.Remove(t.Context(), false); err != nil {
			t.Error(err)
		}
	})
}
