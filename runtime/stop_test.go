package runtime

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"distkit/runtime/spec"

	"golang.org/x/sys/unix"
)

// A container gets the image's signal, and is killed if it ignores that.
func TestStop(t *testing.T) {
	runtimes(t, func(t *testing.T, m *machine) {
		const loop = "echo ready; while :; do sleep 0.02; done"
		for n, tt := range []struct {
			script, image string
			sig           unix.Signal
			grace         time.Duration
			paused        bool
			want          int
		}{
			{"trap 'exit 5' TERM; trap 'exit 6' USR1; " + loop, "", 0, -1, false, 5},
			{"trap 'exit 5' TERM; trap 'exit 6' USR1; " + loop, "SIGUSR1", 0, time.Hour, false, 6},
			{"trap 'exit 5' TERM; trap 'exit 6' USR1; " + loop, "SIGUSR1", unix.SIGTERM, time.Hour, false, 5},
			{"trap 'exit 5' TERM; trap 'exit 6' USR1; " + loop, "no signal", 0, time.Hour, true, 5},
			{"trap '' TERM; " + loop, "", 0, 0, false, 137},
			{"trap '' TERM; " + loop, "", 0, 0, true, 137},
		} {
			m.spec(spec.Options{Args: []string{"sh", "-c", tt.script}, Annotations: map[string]string{"org.opencontainers.image.stopSignal": tt.image}})
			c := m.detached(Record{ID: fmt.Sprintf("test-stop-%d", n)})
			until(t, "readiness", func() bool { return strings.Contains(m.log(c), "ready") })
			if tt.paused {
				if err := c.Pause(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.Stop(t.Context(), tt.sig, tt.grace); err != nil {
				t.Errorf("%+v: %v", tt, err)
			}
			if i := m.info(c); i.Status != Stopped || i.Exit == nil || i.Exit.Status == nil || *i.Exit.Status != tt.want {
				t.Errorf("%+v: %+v %+v", tt, i, i.Exit)
			}
			if err := c.Stop(t.Context(), 0, time.Hour); err != nil {
				t.Errorf("again: %v", err)
			}
			if _, err := c.Remove(t.Context(), false); err != nil {
				t.Error(err)
			}
		}
		made, err := m.containers().Create(t.Context(), Record{ID: "test-stop-made"}, "", nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := made.Stop(t.Context(), 0, time.Hour); err != nil {
			t.Errorf("one that was never started: %v", err)
		}
		if _, err := made.Remove(t.Context(), false); err != nil {
			t.Error(err)
		}
		gone := m.detached(Record{ID: "test-stop-gone", RemoveAtEnd: true})
		if err := gone.Stop(t.Context(), 0, 0); err != nil {
			t.Errorf("one that goes at its end: %v", err)
		}
		until(t, "its removal", func() bool {
			_, err := os.Stat(filepath.Join(m.state, "store/containers"))
			return errors.Is(err, fs.ErrNotExist)
		})
	})
}

// A process's pipe is identified before anything is opened, since the container chooses what else it has open.
func TestFindPipeOpensNothingElse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	held, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	watch, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(watch)
	if _, err := unix.InotifyAddWatch(watch, fifo, unix.IN_OPEN); err != nil {
		t.Fatal(err)
	}
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", w.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	s := &state{HostProcess: HostProcess{Pid: os.Getpid()}}
	f, err := s.findPipe(name, unix.O_RDONLY)
	if f == nil || err != nil {
		t.Fatalf("the pipe: %v %v", f, err)
	}
	f.Close()
	if f, err := s.findPipe("pipe:[1]", unix.O_RDONLY); f != nil || err != nil {
		t.Errorf("a pipe that nobody has: %v %v", f, err)
	}
	if n, _ := unix.Read(watch, make([]byte, 4096)); n > 0 {
		t.Error("a file that is no pipe was opened")
	}
	other, err := os.OpenFile(fifo, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	other.Close()
	if n, _ := unix.Read(watch, make([]byte, 4096)); n <= 0 {
		t.Error("the watch tells of no opening")
	}
}
