package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"distkit/disk"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Layer is one of the snapshots of a chain.
type Layer struct {
	Name string // of the committed snapshot
	// Apply fills the snapshot. It is called again, for another place, where what it made could
	// not be given its parents.
	Apply func(context.Context, Place) error
}

// Place is where a layer is applied.
type Place struct {
	Dir       string   // a path; of File, where that is set, below /proc/self/fd
	File      *os.File // what a process that is to use the directory must inherit, as descriptor 3
	Whiteouts string   // the form of whiteouts: remove, overlay, overlay-user
	// Unresolved is the name of a file that takes what the layer alone can't tell, or empty
	// where its parents are there.
	Unresolved string
}

// stackKey begins the key of a snapshot that Stack fills, before the name that it is to have.
const stackKey = "stack "

// inherited is the path of a Place's File in a process that has inherited it.
const inherited = "/proc/self/fd/3/."

// Stack makes a chain of committed snapshots, the lowest first, each on the one before, the first
// on parent or on nothing. Those that are there are left alone; one that another process is just
// making is waited for. Up to jobs layers are applied at once where the driver can give a
// snapshot its parent afterwards; else one is applied after the other. They are committed in
// order, and done is called with each name once it is there, in order too.
//
// A layer that fails leaves nothing, and neither do those above it; those below are there. The
// same holds where done fails. The error is that of the lowest. A process that is killed leaves an active snapshot with
// [TemporaryLabel], which the next that makes this layer removes.
func (s *Snapshotter) Stack(ctx context.Context, parent string, layers []Layer, jobs int, done func(name string) error) error {
	if parent != "" {
		if _, err := s.parent(parent); err != nil {
			return fmt.Errorf("stack: %w", err)
		}
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	slots := make(chan struct{}, max(jobs, 1))
	below := &made{name: parent, is: make(chan struct{})}
	close(below.is)
	all := make([]*made, 0, len(layers))
	for _, l := range layers {
		m := &made{name: l.Name, is: make(chan struct{})}
		// What fails takes those above with it.
		var cancel context.CancelFunc
		ctx, cancel = context.WithCancel(ctx)
		defer cancel()
		m.cancel = cancel
		go s.stack(ctx, l, m, below, slots)
		all, below = append(all, m), m
	}
	var first error
	for _, m := range all {
		<-m.is
		if first == nil {
			first = m.err
		}
		if first == nil {
			if first = done(m.name); first != nil {
				stop() // those above
			}
		}
	}
	return first
}

// made is a layer of a stack on its way.
type made struct {
	name   string
	is     chan struct{} // closed when it is there, or has failed with err
	err    error
	cancel func()
}

func (m *made) wait(ctx context.Context) error {
	select {
	case <-m.is:
		return m.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Snapshotter) stack(ctx context.Context, l Layer, m, below *made, slots chan struct{}) {
	defer close(m.is)
	m.err = s.stackLayer(ctx, l, below, slots)
	if m.err != nil {
		m.cancel()
		m.err = fmt.Errorf("%s: %w", l.Name, m.err)
	}
}

func (s *Snapshotter) stackLayer(ctx context.Context, l Layer, below *made, slots chan struct{}) error {
	if there, err := s.committed(l.Name); there || err != nil {
		return err
	}
	rebases := s.driver.Whiteouts(s.dir) != "" && below.name != ""
	if !rebases {
		if err := below.wait(ctx); err != nil {
			return err
		}
	}
	unlock, err := s.lockName(ctx, l.Name)
	if err != nil {
		return err
	}
	defer unlock()
	if there, err := s.committed(l.Name); there || err != nil {
		return err
	}
	if rebases {
		err = s.stackOne(ctx, l, below, slots, true)
		if !errdefs.IsFailedPrecondition(err) {
			return err
		}
	}
	return s.stackOne(ctx, l, below, slots, false)
}

// committed tells whether the committed snapshot is there.
func (s *Snapshotter) committed(name string) (bool, error) {
	e, err := s.lookup(name)
	switch {
	case errdefs.IsNotFound(err):
		return false, nil
	case err != nil:
		return false, err
	case e.Kind != Committed:
		return false, taken(e.Kind)
	}
	return true, s.intact()
}

// stackOne makes one layer, whose name is locked, alone or on what is below.
func (s *Snapshotter) stackOne(ctx context.Context, l Layer, below *made, slots chan struct{}, alone bool) (err error) {
	select {
	case slots <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	holds := true
	release := func() {
		if holds {
			<-slots
		}
		holds = false
	}
	defer release()
	key, parent := stackKey+l.Name, below.name
	if alone {
		parent = ""
	}
	labels := map[string]string{TemporaryLabel: "stack"}
	_, err = s.make(ctx, Active, key, parent, labels)
	if errdefs.IsAlreadyExists(err) { // of a dead process: the name's lock is ours
		if err = s.Remove(ctx, key); err == nil {
			_, err = s.make(ctx, Active, key, parent, labels)
		}
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.discard(key))
		}
	}()
	step("layer begins")
	e, err := s.lookup(key)
	if err != nil {
		return err
	}
	t := s.tree(e.id, e.record)
	p := Place{Dir: t.FS(), Whiteouts: "remove"}
	switch {
	case alone:
		p.Whiteouts, p.Unresolved = s.driver.Whiteouts(s.dir), filepath.Join(t.Dir, "unresolved")
	case s.driver.Whiteouts(s.dir) != "" && parent != "":
		if p.File, err = s.driver.Open(t); err != nil {
			return err
		}
		defer p.File.Close()
		p.Dir = inherited
	}
	if err := l.Apply(ctx, p); err != nil {
		return err
	}
	release()
	step("layer applied")
	o := CommitOptions{Parent: below.name}
	if alone {
		if err := below.wait(ctx); err != nil {
			return err
		}
		f, err := disk.Tree(t.Dir).Open("unresolved")
		if err != nil {
			return fmt.Errorf("what is unresolved: %w", err)
		}
		defer f.Close()
		if err := os.Remove(p.Unresolved); err != nil {
			return err
		}
		o.Settle = f
	} else if p.File != nil {
		p.File.Close() // what is mounted could still be written to
	}
	err = s.Commit(ctx, l.Name, key, o)
	if errdefs.IsAlreadyExists(err) { // somebody made it without the lock
		return s.discard(key)
	}
	return err
}

// discard removes a snapshot that was not finished, also when ctx is done.
func (s *Snapshotter) discard(key string) error {
	if err := s.Remove(context.Background(), key); !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// lockName takes the lock of those who make a committed snapshot of that name, and waits for it.
func (s *Snapshotter) lockName(ctx context.Context, name string) (unlock func(), err error) {
	if err := s.checkDirs(); err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	file := s.lockOf(s.namespace, name)
	for {
		f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
		if errors.Is(err, fs.ErrNotExist) {
			if err = s.create(ctx); err == nil {
				err = os.Mkdir(filepath.Dir(file), 0o700)
			}
			if err == nil || errors.Is(err, fs.ErrExist) {
				continue
			}
		}
		if err != nil {
			return nil, fmt.Errorf("lock: %w", err)
		}
		if err := disk.LockContext(ctx, f, unix.LOCK_EX); err != nil {
			return nil, fmt.Errorf("lock: %w", err)
		}
		if disk.Names(file, f) {
			return func() { _ = os.Remove(file); disk.Release(f) }, nil
		}
		disk.Release(f) // the one before has removed it
	}
}

func (s *Snapshotter) lockOf(namespace, name string) string {
	if isDigest(name) {
		namespace = ""
	}
	return filepath.Join(s.dir, "locks", keyFile(namespace, name))
}

// stacking tells whether a process is just filling the snapshot.
func (s *Snapshotter) stacking(e entry) bool {
	name, ok := strings.CutPrefix(e.Key, stackKey)
	if !ok {
		return false
	}
	f, err := lockFile(context.Background(), s.lockOf(e.Namespace, name), os.O_RDWR, unix.LOCK_SH|unix.LOCK_NB)
	if err == nil {
		disk.Release(f)
	}
	return errors.Is(err, unix.EWOULDBLOCK)
}

// sweepLocks deletes the files of locks that nobody has.
func (s *Snapshotter) sweepLocks() {
	locks := filepath.Join(s.dir, "locks")
	names, err := os.ReadDir(locks)
	if err != nil {
		return
	}
	for _, n := range names {
		file := filepath.Join(locks, n.Name())
		if f, err := lockFile(context.Background(), file, os.O_RDWR, unix.LOCK_EX|unix.LOCK_NB); err == nil {
			_ = os.Remove(file)
			disk.Release(f)
		}
	}
}
