package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// guardPipe is the descriptor that a guard has where a shim has the claim's second lock.
const guardPipe = shimWorking

// guard is a small process beside a run in the foreground. It does nothing until that run's process is
// killed, which closes a pipe. Then it ends what the run started, and cleans up.
type guard struct {
	process *os.Process
	pipe    *os.File // which the end of this process closes
}

// startGuard starts the guard of a run, or of a further process in the foreground, before its
// runtime makes anything. The guard shares the locks, so that nobody takes the ID before it is done.
func (u *execution) startGuard() error {
	b, err := json.Marshal(order{Root: u.c.set.root, Namespace: u.c.Namespace, ID: u.c.ID, Command: u.r.command, State: u.r.state, Run: u.state, Exec: u.exec, Guard: true})
	if err != nil {
		return err
	}
	out, in, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start the guard: %w", err)
	}
	defer out.Close()
	c := exec.Command("/proc/self/exe")
	c.Args = []string{shimName, u.c.ID} // what ps shows
	c.Dir, c.Env = "/", shimEnviron()
	c.Stdin = out
	c.ExtraFiles = []*os.File{u.lock, u.claim.lock, out, nil}
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if _, err = in.Write(b); err == nil { // a pipe has room for it
		err = c.Start()
	}
	if err != nil {
		_ = in.Close()
		return fmt.Errorf("start the guard: %w", err)
	}
	u.guard = &guard{c.Process, in}
	return nil
}

// end ends the guard, before the locks that it shares are given back.
func (g *guard) end() {
	if g == nil {
		return
	}
	_ = g.process.Kill()
	go func() { _, _ = g.process.Wait() }() // it may have been waited for with others
}

// guard waits until the run's process has ended, and then ends what that has started.
func (o order) guard(open func(root, namespace, state string) (*Containers, error)) error {
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGPIPE)
	unix.CloseOnExec(guardPipe)
	pipe := os.NewFile(guardPipe, "pipe")
	if _, err := io.Copy(io.Discard, pipe); err != nil {
		return err
	}
	all, err := open(o.Root, o.Namespace, o.State)
	if err != nil {
		return err
	}
	c, err := all.Get(o.ID)
	if err != nil {
		// The store was removed, or its record is broken: that keeps nothing alive.
		c = all.unread(o.ID)
	}
	dir, lock := claimDir(o.State, c.key()), claimLock(o.State, c.key())
	if o.Exec != "" {
		dir = execScratch(o.State, c.key(), o.Exec)
		lock = dir + "/lock"
	}
	// Of its own, since it waits for the runtime, which has the lock of the file that was opened before.
	working, err := os.OpenFile(dir+"/working", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	if _, err := unix.FcntlInt(working.Fd(), unix.F_SETFD, 0); err != nil {
		return err
	}
	u := &execution{c: c, exec: o.Exec, r: &Runtime{command: o.Command, state: o.State}}
	u.lock = os.NewFile(shimLock, filepath.Join(u.place().dir(), "lock"))
	u.claim = &claim{state: o.State, dir: dir, lock: os.NewFile(shimClaim, lock), working: working}
	ctx := context.Background()
	if o.Exec != "" {
		return u.killExec()
	}
	for tries := 0; ; tries++ {
		if err = u.clear(ctx); err == nil || tries == 10 {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		return err // the next call that clears up tries again
	}
	return u.leave(ctx)
}

// clear ends what a killed run has started, whatever has become of the container's directory in the store.
func (u *execution) clear(ctx context.Context) error {
	err := u.c.clear(ctx, u.claim)
	if errdefs.IsNotFound(err) {
		err = nil
	}
	s, serr := readPrivateState(u.claim.dir)
	if s == nil || serr != nil {
		return errors.Join(err, serr)
	}
	return errors.Join(err, s.clearHost(ctx, u.claim, u.c.key()))
}

// killExec ends a further process whose runner was killed.
func (u *execution) killExec() error {
	if err := u.killStarted(); err != nil {
		return err
	}
	err := removeExecDir(u.place())
	u.claim.release()
	if cerr := u.lock.Close(); err == nil {
		err = cerr
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the container has been removed
	}
	return err
}

// killStarted kills a further process, if the runtime has started it, and what that started and has not left its
// session.
func (u *execution) killStarted() error {
	u.claim.quiet()
	l, err := look(u.c.place())
	if errdefs.IsNotFound(err) { // the store was removed
		if l.state, err = readPrivateState(claimDir(u.r.state, u.c.key())); l.state != nil && l.state.Alive() {
			l.status = Running
		}
	}
	if err == nil && (l.status == Running || l.status == Paused) {
		pid, leader := 0, uint64(0)
		if s, _ := readPrivateState(u.claim.dir); s != nil && s.Status == Running {
			pid, leader = s.Pid, s.Session
		} else {
			pid, _ = readPid(u.claim.path("pid"))
		}
		// The session need not have the process's number: crun makes it in a process that is gone.
		if s, err := statOf(pid); err == nil && leader == 0 && slices.Contains(u.c.pids(l), pid) {
			leader = s.session
		}
		if own, err := statOf(l.state.Pid); err != nil || leader == own.session {
			leader = uint64(pid)
		}
		session := func() (pids []int) {
			for _, p := range u.c.pids(l) {
				if s, err := statOf(p); err == nil && pid > 0 && (p == pid || s.session == leader) {
					pids = append(pids, p)
				}
			}
			return pids
		}
		for range 100 {
			if len(session()) == 0 {
				break
			}
			if err := signalAll(session, unix.SIGKILL); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return nil
}
