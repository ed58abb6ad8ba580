package runtime

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"distkit/events"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// neverRun reports whether the container has never been run.
func (c *Container) neverRun() bool {
	l, err := c.proc("").look()
	return err == nil && l.state == nil && l.exit == nil
}

// dead reports whether the container must be cleared up: its process, or the start of it, has ended and no monitor is
// left to record that. A container that is to be removed at its end must then be removed too.
func (c *Container) dead() bool {
	l, err := c.proc("").look()
	if err != nil {
		return false
	}
	switch {
	case l.state != nil:
		// A process in the foreground ends with its run, but what is left of that on the host must be removed.
		return !l.monitored && (!l.runs() || !l.state.Detached)
	case !c.own:
		return false // made by another user or host, so this host has nothing of it
	case c.RemoveAtEnd:
		return l.exit != nil || c.Owner != nil && !c.Owner.Alive()
	}
	return l.lost()
}

// runIsGone reports whether the container was to be removed at its end, and its foreground run was killed. Its ID is
// then free.
func (c *Container) runIsGone() bool {
	l, err := c.proc("").look()
	return err == nil && c.RemoveAtEnd && l.state != nil && !l.state.Detached && !l.monitored
}

// Clear clears up containers of the namespace that have ended without a monitor. It removes what is left of them on the
// host, records that they have ended, and removes those that were to be removed at their end. It leaves others alone.
// Errors are ignored: the next call that works on the container meets them and reports them.
func (s *Containers) Clear(ctx context.Context) {
	ids, first, err := s.due()
	if err != nil {
		return
	}
	for _, id := range ids {
		c, err := s.readRecord(id)
		if err != nil {
			continue
		}
		if first && c.RemoveAtEnd && c.markDue() != nil {
			first = false
		}
		c.own = true // read checks the seal later, for the few containers that may be dead
		if !c.dead() {
			continue
		}
		lock, err := lockFile(s.tree(), c.rel("lock"), false)
		if err != nil {
			continue
		}
		if c, err = s.read(id); err != nil || !c.dead() {
			_ = lock.Close()
			continue
		}
		if err := c.clear(ctx, nil); err == nil && c.RemoveAtEnd {
			_ = c.remove(ctx, lock)
			continue
		}
		_ = lock.Close()
	}
	if first && len(ids) > 0 {
		_ = s.writeDue(seen, bootID())
	}
}

// seen is a file in the due directory with the ID of the boot in which all containers were checked. The name is not
// valid for a container.
const seen = ".seen"

// dueDir returns a directory on this host with a file for each container of this store and namespace that is to be
// removed at its end. Clear checks these, and the containers with the state of a run. Others leave nothing to clear up,
// and a store may have thousands, except that a boot may have cut runs short. So Clear checks all containers once after
// each boot.
func (s *Containers) dueDir() (string, error) {
	root, err := identify(s.root)
	return filepath.Join(s.state, "due", fmt.Sprintf("%s+%x+%x+%x", s.namespace, root.Device, root.Inode, root.Born)), err
}

// writeDue writes a file in the due directory.
func (s *Containers) writeDue(name, text string) error {
	dir, err := s.dueDir()
	if err == nil {
		err = PrivateDir(s.state)
	}
	for tries := 0; err == nil; tries++ {
		if err = os.MkdirAll(dir, 0o700); err == nil {
			err = os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600)
		}
		if !errors.Is(err, fs.ErrNotExist) || tries == 10 {
			break
		}
		err = nil // the last container was removed in between, and the directory with it
	}
	return err
}

// markDue is called before the container's record is written, unmarkDue after it has been removed.
func (c *Container) markDue() error { return c.set.writeDue(c.ID, "") }

func (c *Container) unmarkDue() {
	if dir, err := c.set.dueDir(); err == nil {
		_ = os.Remove(filepath.Join(dir, c.ID))
	}
}

// removeDue removes the due directory of a namespace without containers. A mark made in the meantime keeps it.
func (s *Containers) removeDue() {
	if dir, err := s.dueDir(); err == nil {
		_ = os.Remove(filepath.Join(dir, seen))
		_ = os.Remove(dir)
		_ = os.Remove(filepath.Dir(dir))
	}
}

// due lists the IDs of containers that may have to be cleared up. first is true if these are all containers, because
// nobody has checked them since the boot.
func (s *Containers) due() (ids []string, first bool, err error) {
	dir, err := s.dueDir()
	if err != nil {
		return nil, false, err
	}
	if boot, err := os.ReadFile(filepath.Join(dir, seen)); err != nil || string(boot) != bootID() || privateState(s.state) != nil {
		ids, err = s.ids()
		return ids, true, err
	}
	marked, err := os.ReadDir(dir)
	if err != nil {
		return nil, false, err
	}
	running, err := os.ReadDir(filepath.Join(s.state, "run"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, false, err
	}
	for _, e := range marked {
		ids = append(ids, e.Name())
	}
	for _, e := range running {
		namespace, id, ok := strings.Cut(e.Name(), "+")
		if !ok {
			namespace, id = "default", e.Name()
		}
		if namespace == s.namespace {
			ids = append(ids, id)
		}
	}
	ids = slices.DeleteFunc(ids, func(id string) bool { return CheckID(id) != nil })
	slices.Sort(ids)
	return slices.Compact(ids), false, nil
}

// clear removes what the last run has left on the host, including its process, and records an end that nobody saw. The
// caller holds the lock; held is the claim on the ID, or nil.
func (c *Container) clear(ctx context.Context, held *claim) (err error) {
	l, err := c.proc("").look()
	if err != nil || l.state == nil && !l.lost() {
		return err
	}
	claim := held
	if held == nil && l.state != nil {
		if claim, err = c.proc("").claimHost(ctx); err != nil {
			return err
		}
		// After a failure the state is kept for the next attempt.
		defer func() {
			if err == nil {
				claim.release()
			} else {
				claim.close()
			}
		}()
	}
	if l.state != nil {
		if err = l.state.clearHost(ctx, claim, c.key()); err != nil {
			return fmt.Errorf("container %s: %w", c.ID, err)
		}
	}
	if err = c.unmountSnapshot(); err != nil {
		return err
	}
	c.disconnect(ctx)
	if err = removeAll(c.set.tree(), c.rel("exec")); err != nil {
		return err
	}
	switch {
	case l.exit != nil && !l.exit.Exited.IsZero():
	case l.state == nil || l.state.Status == Running:
		var s state
		if l.state != nil {
			s = *l.state
		}
		err = c.proc("").record(s, Exit{Exited: time.Now().UTC(), Error: errLost})
	default:
		if err = os.Remove(c.path("exit.json")); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	if err == nil && held != nil && l.state != nil {
		err = os.Remove(held.path("state.json"))
	}
	return err
}

// clearHost kills what is left of a run, and removes what the runtime has made for it. The caller has the claim on the
// ID.
func (s *state) clearHost(ctx context.Context, c *claim, key string) error {
	r := &Runtime{command: s.Runtime, state: c.state}
	// A runtime that is still working ends when the processes that it makes are killed. Until then it may make more.
	if err := killAll(ctx, s); err != nil {
		return err
	}
	quiet := c.quiet() // a container that was made but not started keeps its runtime busy until it is removed
	if err := killAll(ctx, s); err != nil {
		return err
	}
	if err := r.remove(ctx, c, key); err != nil {
		return err
	}
	if !quiet && !c.quiet() {
		return busy("a runtime that an earlier run started still works on it")
	}
	removeCgroups(s.Cgroups)
	s.freeUsers()
	return nil
}

// remove removes a container without a process. It takes over the lock.
func (c *Container) remove(ctx context.Context, lock *os.File) error {
	if err := c.UnmountRoot(); err != nil {
		_ = lock.Close()
		return fmt.Errorf("remove container %s: %w", c.ID, err)
	}
	atStep("remove")
	if err := c.removeResources(ctx); err != nil {
		_ = lock.Close()
		return fmt.Errorf("remove container %s: %w", c.ID, err)
	}
	atStep("snapshot removed")
	if err := c.delete(lock); err != nil {
		return fmt.Errorf("remove container %s: %w", c.ID, err)
	}
	c.log(events.Event{Topic: "/containers/delete"})
	return nil
}

// removeResources removes what was made for the container outside of its directory.
func (c *Container) removeResources(ctx context.Context) error {
	if path := c.network(); path != "" {
		if err := c.set.networks.Remove(ctx, path); err != nil {
			return fmt.Errorf("network: %w", err)
		}
	}
	if c.Snapshot != nil {
		if err := c.set.snapshots.Remove(ctx, *c.Snapshot); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// clearKilled ends what a killed foreground run has started, even if the container's directory in the store is gone.
// What it can't end is left to the next call that clears up.
func (u *execution) clearKilled(ctx context.Context) error {
	for tries := 0; ; tries++ {
		err := u.tryClearKilled(ctx)
		switch {
		case err == nil && u.exec != "": // the last attempt: it releases the locks
			return u.vanish()
		case err == nil:
			return u.leave(ctx)
		case tries == 10:
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
}

func (u *execution) tryClearKilled(ctx context.Context) error {
	if u.exec != "" {
		return u.killStarted()
	}
	err := u.c.clear(ctx, u.claim)
	if errdefs.IsNotFound(err) {
		err = nil
	}
	s, serr := readPrivateState(u.private)
	if s != nil && serr == nil {
		serr = s.clearHost(ctx, u.claim, u.c.key())
	}
	return errors.Join(err, serr)
}

// killStarted kills a further process, if the runtime has started it, and the processes in its session.
func (u *execution) killStarted() error {
	if !u.claim.quiet() {
		return busy("a runtime still works on it")
	}
	l, err := u.c.proc("").look()
	if errdefs.IsNotFound(err) { // the store was removed
		if l.state, err = readPrivateState(u.c.proc("").private); l.state != nil && l.state.Alive() {
			l.status = Running
		}
	}
	if err != nil || !l.runs() {
		return err
	}
	pid, leader := 0, uint64(0)
	if s, _ := readPrivateState(u.claim.dir); s != nil && s.Status == Running {
		pid, leader = s.Pid, s.Session
	} else if pid, err = readPid(u.claim.path("pid")); err != nil {
		return nil //nolint:nilerr // the runtime has ended, and started none
	}
	// The session may have another number than the process: crun makes the session in a process that has exited.
	if s, err := statOf(pid); err == nil && leader == 0 && slices.Contains(l.pids(), pid) {
		leader = s.session
	}
	if own, err := statOf(l.state.Pid); err != nil || leader == 0 || leader == own.session {
		leader = uint64(pid)
	}
	session := func() (pids []int) {
		for _, p := range l.pids() {
			if s, err := statOf(p); err == nil && (p == pid || s.session == leader) {
				pids = append(pids, p)
			}
		}
		return pids
	}
	for range 100 { // processes of a paused container die when it is resumed
		if len(session()) == 0 {
			break
		}
		if err := signalAll(session, unix.SIGKILL); err != nil {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil
}
