package runtime

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	runc "github.com/containerd/go-runc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Runtime is an OCI runtime's program and where it keeps its state.
type Runtime struct {
	command string
	state   string
}

// Find looks for a runtime: a program's name or path, "" for runc, else crun. State is the
// directory for what runs, see [DefaultState]; the runtime's own is in it under the program's
// name, so that `runc --root STATE/runc list` shows the containers. No runtime is NotFound.
func Find(name, state string) (*Runtime, error) {
	names := []string{name}
	if name == "" {
		names = []string{"runc", "crun"}
	}
	for _, n := range names {
		command, err := exec.LookPath(n)
		if err != nil && !strings.Contains(n, "/") {
			// A user's PATH may lack where distributions put runc.
			for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
				if command, err = exec.LookPath(filepath.Join(dir, n)); err == nil {
					break
				}
			}
		}
		if err == nil {
			if command, err = filepath.Abs(command); err != nil {
				return nil, fmt.Errorf("runtime %s: %w", n, err)
			}
			if state, err = filepath.Abs(state); err != nil {
				return nil, fmt.Errorf("state directory: %w", err)
			}
			return &Runtime{command: command, state: state}, nil
		}
	}
	if name == "" {
		return nil, notFound("no OCI runtime: install runc or crun, or name one with --runtime")
	}
	return nil, notFound("runtime %s is not installed", name)
}

// runc is the runtime's client for one container, logging into a file of the claim's.
func (r *Runtime) client(c *claim) *runc.Runc {
	return &runc.Runc{
		Command:   r.command,
		Root:      r.root(),
		Log:       c.path("log"),
		LogFormat: runc.JSON,
		Setpgid:   true, // a terminal's ^C is for us to forward, once
	}
}

func (r *Runtime) root() string { return filepath.Join(r.state, filepath.Base(r.command)) }

// Run runs a bundle in the foreground and returns the status of its process: what it exited
// with, or 128+n if signal n ended it. The process has this one's standard streams, or, if the
// bundle says so, a terminal of its own that is copied from and to them. Signals that this
// process gets are forwarded to it; the third INT or TERM that it doesn't heed kills it.
//
// The ID is in use (Unavailable) while the process that runs it lives. What one that was
// killed has left, its container too, is removed first, and nothing is left afterwards.
//
// A bundle without config.json, root filesystem or mount source is NotFound. A command that
// isn't there or can't be executed wraps [ErrCommandNotFound] or [ErrCommandNotExecutable].
func (r *Runtime) Run(ctx context.Context, id, bundleDir string) (status int, err error) {
	b, err := openBundle(bundleDir)
	if err != nil {
		return -1, err
	}
	if err := privateDir(r.state); err != nil {
		return -1, err
	}
	c, err := claimID(r.state, id)
	if err != nil {
		return -1, err
	}
	defer c.release()
	client := r.client(c)
	if err := r.reclaim(ctx, client, c, id); err != nil {
		return -1, err
	}

	signals := make(chan os.Signal, 64)
	signal.Notify(signals, forwarded()...)
	defer signal.Stop(signals)
	// The container's process becomes our child when the runtime that made it ends.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return -1, fmt.Errorf("become subreaper: %w", err)
	}
	opts := &runc.CreateOpts{IO: inherited{}, Detach: true, PidFile: c.path("pid")}
	var term *terminal
	if b.spec.Process.Terminal {
		if term, err = newTerminal(c.path("console")); err != nil {
			return -1, err
		}
		defer term.close()
		opts.IO, opts.ConsoleSocket = nil, term
	}
	ended := false
	defer func() {
		if ended && r.removeEnded(b, id) {
			return
		}
		if rerr := r.remove(ctx, client, id); rerr != nil && err == nil {
			err = rerr
		}
	}()
	if err := r.start(ctx, client, id, b.dir, opts, term); err != nil {
		return -1, r.startError(b, c, err)
	}
	pid, err := readPid(c.path("pid"))
	if err != nil {
		return -1, err
	}
	status, err = wait(pid, signals, term)
	ended = err == nil
	return status, err
}

// start makes and starts a container: at once where it can. A terminal must have its size
// before the process looks at it. And only runc leaves a process that ends at once to be waited
// for; others must have ended themselves before the container's process begins.
func (r *Runtime) start(ctx context.Context, client *runc.Runc, id, dir string, opts *runc.CreateOpts, term *terminal) error {
	if term == nil && filepath.Base(r.command) == "runc" {
		_, err := client.Run(ctx, id, dir, opts)
		return err
	}
	opts.Detach = false
	if err := client.Create(ctx, id, dir, opts); err != nil {
		return err
	}
	if term != nil {
		if err := term.start(); err != nil {
			return err
		}
	}
	return client.Start(ctx, id)
}

// inherited gives the container this process's own standard streams: nothing is copied.
type inherited struct{ runc.IO }

func (inherited) Set(c *exec.Cmd) { c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr }

// reclaim removes what a run of the same ID has left that did not live to do so, after the
// runtime that it may have started has ended.
func (r *Runtime) reclaim(ctx context.Context, client *runc.Runc, c *claim, id string) error {
	quiet := c.quiet()
	_, err := os.Lstat(filepath.Join(r.root(), id))
	if err == nil {
		err = r.remove(ctx, client, id)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("container %s: %w", id, err)
	}
	if !quiet && !c.quiet() {
		return busy("container %s: a runtime that an earlier run started still works on it", id)
	}
	for _, name := range []string{"pid", "log"} {
		_ = os.Remove(c.path(name))
	}
	return nil
}

// remove deletes a container in whatever state it is. One that isn't there is removed.
func (r *Runtime) remove(ctx context.Context, client *runc.Runc, id string) error {
	err := client.Delete(ctx, id, &runc.DeleteOpts{Force: true})
	if err == nil {
		return nil
	}
	dir := filepath.Join(r.root(), id)
	if _, serr := os.Lstat(dir); errors.Is(serr, fs.ErrNotExist) {
		return nil
	}
	// A runtime killed between making its directory and writing its state refuses it for ever.
	if os.Remove(filepath.Join(dir, "exec.fifo")); os.Remove(dir) == nil {
		return nil
	}
	return fmt.Errorf("remove container %s: %s", id, firstLine(err.Error()))
}

// removeEnded removes a container whose process has ended, as `runc delete` does, without
// starting runc once more, which takes a quarter of the time of a short run. It does so only
// where removing directories is all there is to do: runc's state, the cgroups it names, and a
// PID namespace that the kernel has emptied. Otherwise, and where anything is unexpected, it
// leaves the rest to remove and returns false.
func (r *Runtime) removeEnded(b *bundle, id string) bool {
	if filepath.Base(r.command) != "runc" || b.spec.Hooks != nil || b.spec.Linux == nil || b.spec.Linux.IntelRdt != nil ||
		!slices.ContainsFunc(b.spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace && n.Path == "" }) {
		return false
	}
	dir := filepath.Join(r.root(), id)
	data, err := os.ReadFile(filepath.Join(dir, "state.json"))
	if err != nil {
		return false
	}
	var state struct {
		CgroupPaths map[string]string `json:"cgroup_paths"`
	}
	if json.Unmarshal(data, &state) != nil || len(state.CgroupPaths) == 0 {
		return false
	}
	for _, p := range state.CgroupPaths {
		if !strings.HasPrefix(p, "/sys/fs/cgroup/") {
			return false
		}
		if err := unix.Rmdir(p); err != nil && err != unix.ENOENT {
			return false
		}
	}
	return os.RemoveAll(dir) == nil
}

// startError is what the runtime logged of its failure.
func (r *Runtime) startError(b *bundle, c *claim, err error) error {
	message := ""
	if f, ferr := os.Open(c.path("log")); ferr == nil {
		defer f.Close()
		lines := bufio.NewScanner(f)
		lines.Buffer(nil, maxDocument)
		for lines.Scan() {
			var entry struct{ Level, Msg string }
			if json.Unmarshal(lines.Bytes(), &entry) == nil && entry.Level == "error" {
				message = entry.Msg
			}
		}
	}
	if message == "" {
		return fmt.Errorf("%s: %w", filepath.Base(r.command), err)
	}
	told := func(err error) error {
		if b.spec.Process.Terminal {
			return err
		}
		return fmt.Errorf("%w%w", err, errTold)
	}
	message = strings.TrimPrefix(firstLine(message), "runc run failed: ")
	message = strings.TrimPrefix(message, "unable to start container process: ")
	// The runtimes' words are all there is to tell these by; docker does the same.
	command := strings.HasPrefix(message, "exec: ") || strings.HasPrefix(message, "exec "+strconv.Quote(b.spec.Process.Args[0])) ||
		strings.HasPrefix(message, "executable file") || strings.HasPrefix(message, "open executable")
	switch {
	case command && (strings.Contains(message, "not found") || strings.Contains(strings.ToLower(message), "no such file")):
		return told(commandError(b.spec.Process.Args[0], ErrCommandNotFound))
	case command && (strings.Contains(strings.ToLower(message), "permission denied") || strings.Contains(message, "not permitted") || strings.Contains(message, "is a directory")):
		return told(commandError(b.spec.Process.Args[0], ErrCommandNotExecutable))
	}
	return told(fmt.Errorf("%s: %s", filepath.Base(r.command), message))
}

// errTold marks an error that the runtime has written to the standard error that it shares
// with the container.
var errTold = told{}

type told struct{}

func (told) Error() string { return "" }

// Told tells whether standard error has the message of an error of [Runtime.Run] already: the
// runtime writes its own there, since the container inherits it.
func Told(err error) bool { return errors.Is(err, errTold) }

func firstLine(s string) string {
	s, _, _ = strings.Cut(strings.TrimSpace(s), "\n")
	return s
}

func readPid(name string) (int, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return 0, fmt.Errorf("read pid: %w", err)
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(b)))
	if err != nil || pid <= 1 {
		return 0, fmt.Errorf("read pid: %q is none", b)
	}
	return pid, nil
}

// forwarded are the signals that are passed on: all that ask a process for something, but for
// those of job control, which concern this process, and those that the parent had ignored.
func forwarded() []os.Signal {
	all := []os.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM, unix.SIGWINCH}
	for s := syscall.Signal(34); s <= 64; s++ {
		all = append(all, s)
	}
	var out []os.Signal
	for _, s := range all {
		if !signal.Ignored(s) {
			out = append(out, s)
		}
	}
	return out
}

// wait forwards signals to a child until it ends.
func wait(pid int, signals <-chan os.Signal, term *terminal) (int, error) {
	type end struct {
		status unix.WaitStatus
		err    error
	}
	// The descriptor names this very process: until it is waited for its number isn't reused,
	// and after that the descriptor refuses signals.
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, fmt.Errorf("open container's process: %w", err)
	}
	defer unix.Close(fd)
	ended := make(chan end, 1)
	go func() {
		var e end
		for {
			if _, e.err = unix.Wait4(pid, &e.status, 0, nil); e.err != unix.EINTR {
				break
			}
		}
		ended <- e
	}()
	unheeded := 0
	for {
		select {
		case e := <-ended:
			switch {
			case e.err != nil:
				return -1, fmt.Errorf("wait for container's process: %w", e.err)
			case e.status.Signaled():
				return 128 + int(e.status.Signal()), nil
			}
			return e.status.ExitStatus(), nil
		case s := <-signals:
			sig := s.(syscall.Signal)
			if sig == unix.SIGWINCH && term != nil {
				term.resize()
				continue
			}
			// The kernel keeps a namespace's first process from signals it doesn't catch.
			if (sig == unix.SIGINT || sig == unix.SIGTERM) && !catches(pid, sig) {
				if unheeded++; unheeded == 3 {
					sig = unix.SIGKILL
				}
			}
			_ = unix.PidfdSendSignal(fd, sig, nil, 0)
		}
	}
}

// catches tells whether a process has a handler for a signal.
func catches(pid int, sig syscall.Signal) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return true
	}
	_, rest, _ := strings.Cut(string(b), "\nSigCgt:")
	mask, err := strconv.ParseUint(strings.TrimSpace(firstLine(rest)), 16, 64)
	return err != nil || mask&(1<<(sig-1)) != 0
}

// ExitStatus tells docker's status for an error of [Runtime.Run]: 127 and 126 for the
// command's, else 125.
func ExitStatus(err error) int {
	switch {
	case errors.Is(err, ErrCommandNotFound):
		return 127
	case errors.Is(err, ErrCommandNotExecutable):
		return 126
	}
	return 125
}
