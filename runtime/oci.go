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
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"distkit/runtime/spec"
	"distkit/runtime/stdio"

	runc "github.com/containerd/go-runc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Runtime is the program of an OCI runtime, and the directory for its state.
type Runtime struct {
	command string
	state   string

	cgroupParent string
	log          string   // see LogTo
	output       *os.File // the file for the output, with log
}

// Find looks for a runtime: a program's name or path; "" means runc, or else crun. state is the directory for the state
// of runs, see [DefaultState]. The runtime's own state is below it under the program's name, so that `runc --root
// STATE/runc list` shows the containers. NotFound: there is no such runtime.
func Find(name, state string) (*Runtime, error) {
	names := []string{name}
	if name == "" {
		names = []string{"runc", "crun"}
	}
	for _, n := range names {
		command, err := exec.LookPath(n)
		if err != nil && !strings.Contains(n, "/") {
			// distributions put runc there, and a user's PATH may lack it
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

// Command returns the path of the runtime's program.
func (r *Runtime) Command() string { return r.command }

// Recorded returns a runtime's name for a [Record], where a path must be absolute. NotFound: there is no such runtime.
func Recorded(name string) (string, error) {
	if name == "" {
		return "", nil
	}
	r, err := Find(name, "/")
	if err == nil && strings.Contains(name, "/") {
		name = r.command
	}
	return name, err
}

// client returns the runtime's client for one run. It logs to a file in the claim's directory.
func (r *Runtime) client(c *claim) *runc.Runc {
	return &runc.Runc{
		Command:   r.command,
		Root:      r.root(),
		Log:       c.path("log"),
		LogFormat: runc.JSON,
		Setpgid:   true, // so that a terminal's ^C reaches only us, and is forwarded once
	}
}

func (r *Runtime) root() string { return filepath.Join(r.state, filepath.Base(r.command)) }

// make lets the runtime make the process, and start it at once if possible. It is made first and started later in two
// cases: a terminal must have its size before the process sees it, and a runtime other than runc must have exited
// before the process starts, since it would otherwise reap a process that ends at once.
func (r *Runtime) make(ctx context.Context, u *execution, opts *runc.CreateOpts, console *stdio.Console) (err error) {
	client, id, created := r.client(u.claim), u.c.key(), false
	switch {
	case u.exec != "":
		err = r.execute(ctx, client, id, u.config, opts)
	case u.images != "":
		err = r.restore(ctx, client, u, opts, console != nil)
	case console == nil && filepath.Base(r.command) == "runc":
		_, err = client.Run(ctx, id, u.job.Bundle, opts)
	default:
		opts.Detach, created = false, true
		err = client.Create(ctx, id, u.job.Bundle, opts)
	}
	if err == nil && console != nil {
		err = console.Receive()
	}
	if err == nil && created {
		err = client.Start(ctx, id)
	}
	return err
}

// execute lets the runtime start a further process.
func (r *Runtime) execute(ctx context.Context, client *runc.Runc, id string, p *specs.Process, opts *runc.CreateOpts) error {
	// otherwise runc would use its own umask
	umask := 0o022
	if p.User.Umask != nil {
		umask = int(*p.User.Umask)
	}
	defer unix.Umask(unix.Umask(umask))
	return client.Exec(ctx, id, *p, &runc.ExecOpts{IO: opts.IO, PidFile: opts.PidFile, ConsoleSocket: opts.ConsoleSocket, Detach: true})
}

// reclaim removes what an earlier run with the same ID has left. It first waits for the runtime that such a run may
// have started.
func (r *Runtime) reclaim(ctx context.Context, c *claim, id string) error {
	quiet := c.quiet()
	_, err := os.Lstat(filepath.Join(r.root(), id))
	if err == nil {
		err = r.remove(ctx, c, id)
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

// remove deletes a container in any state. It succeeds if there is none.
func (r *Runtime) remove(ctx context.Context, c *claim, id string) error {
	dir := filepath.Join(r.root(), id)
	// At this FIFO a start waits for the container's process. If that was killed before it came there, the start would
	// wait for ever, so open the other end.
	fifo, ferr := unix.Open(filepath.Join(dir, "exec.fifo"), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	err := r.client(c).Delete(ctx, id, &runc.DeleteOpts{Force: true})
	if ferr == nil {
		if end, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fifo), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
			c.quiet()
			_ = unix.Close(end)
		}
		_ = unix.Close(fifo)
	}
	if err == nil {
		return nil
	}
	if _, serr := os.Lstat(dir); errors.Is(serr, fs.ErrNotExist) {
		return nil
	}
	// If a runtime is killed after making its directory and before writing its state, it rejects that directory ever
	// after.
	if os.Remove(filepath.Join(dir, "exec.fifo")); os.Remove(dir) == nil {
		return nil
	}
	return fmt.Errorf("remove container %s: %s", id, firstLine(err.Error()))
}

// removeEnded removes a container whose process has ended, as `runc delete` does. It does not start runc again, which
// would take a quarter of the time of a short run. It handles only the case in which directories are all there is to
// remove: runc's state, the container's cgroups, and a PID namespace that the kernel has emptied. In any other case,
// and after any surprise, it returns false, and remove must do the rest.
func (r *Runtime) removeEnded(j job, id string, cgroups []string) bool {
	if !j.Simple || len(cgroups) == 0 {
		return false
	}
	dir := filepath.Join(r.root(), id)
	for _, d := range cgroups {
		if err := unix.Rmdir(d); err != nil && err != unix.ENOENT {
			return false
		}
	}
	return os.RemoveAll(dir) == nil
}

// job returns the properties of a bundle that matter for running it.
func (b *bundle) job(r *Runtime) job {
	l := b.spec.Linux
	return job{
		Bundle: b.dir, Command: b.command()[0],
		Simple: filepath.Base(r.command) == "runc" && b.spec.Hooks == nil && ownPIDs(l) && l.IntelRdt == nil,
	}
}

// ownPIDs reports whether a container gets a new PID namespace, with its process as the first.
func ownPIDs(l *specs.Linux) bool {
	return l != nil && slices.ContainsFunc(l.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace && n.Path == "" })
}

// startError returns the error that the runtime has logged.
func (r *Runtime) startError(u *execution, err error) error {
	message := ""
	if f, ferr := os.Open(u.claim.path("log")); ferr == nil {
		defer f.Close()
		lines := bufio.NewScanner(f)
		lines.Buffer(nil, spec.MaxDocument)
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
	markTold := func(err error) error {
		if u.state.Terminal {
			return err
		}
		return fmt.Errorf("%w%w", err, errTold)
	}
	message = firstLine(message)
	for _, p := range []string{"runc run failed: ", "runc create failed: ", "exec failed: "} {
		message = strings.TrimPrefix(message, p)
	}
	message = strings.TrimPrefix(message, "unable to start container process: ")
	// Only the runtimes' messages distinguish these errors. Docker parses them too.
	command := strings.HasPrefix(message, "exec: ") || strings.HasPrefix(message, "exec "+strconv.Quote(u.job.Command)) ||
		strings.HasPrefix(message, "executable file") || strings.HasPrefix(message, "open executable")
	switch {
	case command && (strings.Contains(message, "not found") || strings.Contains(strings.ToLower(message), "no such file")):
		return markTold(commandError(u.job.Command, ErrCommandNotFound))
	case command && (strings.Contains(strings.ToLower(message), "permission denied") || strings.Contains(message, "not permitted") || strings.Contains(message, "is a directory")):
		return markTold(commandError(u.job.Command, ErrCommandNotExecutable))
	}
	return markTold(fmt.Errorf("%s: %s", filepath.Base(r.command), message))
}

// errTold marks an error whose message the runtime has written to standard error, which it shares with the container.
var errTold = toldError{}

type toldError struct{}

func (toldError) Error() string { return "" }

// Told reports whether the message of an error of [Container.Run] is already on standard error: the runtime writes
// there what the container's process inherits.
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

// ExitStatus returns docker's status for an error of [Container.Run]: 127 or 126 if the command is the cause, else 125.
func ExitStatus(err error) int {
	switch {
	case errors.Is(err, ErrCommandNotFound):
		return 127
	case errors.Is(err, ErrCommandNotExecutable):
		return 126
	}
	return 125
}
