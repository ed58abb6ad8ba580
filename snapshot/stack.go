package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"distkit/disk"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Layer is one of the layers of a chain.
type Layer struct {
	Name string // name of the committed snapshot
	// Apply applies the layer to a place. If the result can't be settled on its parents, Apply is called again for
	// another place.
	Apply func(context.Context, Place) error
}

// Place is where a layer is to be applied.
type Place struct {
	Dir       string   // a path; if File is set, one below /proc/self/fd
	File      *os.File // if not nil, must be inherited as descriptor 3 by the process that uses Dir
	Whiteouts string   // form of whiteouts: remove, overlay, overlay-user or archive
	// Unresolved is the file for what the layer can't decide without its parents. It is "" if the parents are there.
	Unresolved string
}

// stackKey is the prefix of the keys under which Stack prepares snapshots. The name of the committed snapshot follows
// it.
const stackKey = "stack "

// inherited is the path of a Place's File in a process that has inherited it.
const inherited = "/proc/self/fd/3/."

// Stack makes a chain of committed snapshots from layers, the lowest first. The first layer's parent is parent, which
// may be "". Existing snapshots are kept, and one that another process is making is waited for.
//
// If the driver can give a snapshot its parent when it is committed, up to jobs layers are applied at the same time,
// otherwise one after the other. They are committed in order. All layers that are ready together share one sync of the
// file system. done is called with each name, in order, once the snapshot exists.
//
// If a layer fails, the layers below it exist, and neither it nor those above leave anything. If done fails, the layers
// above are cancelled, but those committed together with it exist. The error is that of the lowest layer that failed. A
// killed process leaves active snapshots with [TemporaryLabel]; the next call for the same layer removes them.
//
// If the driver finds at the end that the layers together are invalid (ErrInvalidArgument, ErrDataLoss), the snapshots
// that this call has made are removed.
func (s *Snapshotter) Stack(ctx context.Context, parent string, layers []Layer, jobs int, done func(name string) error) error {
	if parent != "" {
		if _, err := s.parent(parent); err != nil {
			return fmt.Errorf("stack: %w", err)
		}
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	slots := make(chan struct{}, max(jobs, 1))
	below := newMade(ctx, parent)
	below.end(nil)
	all := make([]*made, 0, len(layers))
	for _, l := range layers {
		// cancelling a layer cancels those above it
		m := newMade(below.ctx, l.Name)
		defer m.cancel()
		go s.stack(l, m, below, slots)
		all, below = append(all, m), m
	}
	var first error
	for i, m := range all {
		s.commitEach(m, all[i+1:])
		if first == nil {
			first = m.err
		}
		if first == nil {
			if first = done(m.name); first != nil {
				stop() // the layers above
			}
		}
	}
	if a, ok := s.driver.(Archiver); ok && first == nil && len(layers) > 0 {
		if err := s.complete(ctx, a, below.name); err != nil {
			if errdefs.IsInvalidArgument(err) || errdefs.IsDataLoss(err) {
				s.withdraw(ctx, all)
			}
			return fmt.Errorf("%s: %w", below.name, err)
		}
	}
	return first
}

// withdraw removes the snapshots that this call has committed, from the top down to the first that is in use.
func (s *Snapshotter) withdraw(ctx context.Context, layers []*made) {
	r := s.Remover()
	for _, m := range slices.Backward(layers) {
		if m.committed {
			if err := r.Remove(ctx, m.name); err != nil && !errdefs.IsNotFound(err) {
				return
			}
		}
	}
}

func (s *Snapshotter) complete(ctx context.Context, a Archiver, name string) error {
	below, held, err := s.holdParent(ctx, name)
	if err != nil {
		return err
	}
	defer disk.Release(held)
	left, err := a.Complete(ctx, s.tree(0, record{Parents: below}).Parents)
	if err == nil && len(left) > 0 && s.options.Left != nil {
		s.options.Left(name, left)
	}
	return err
}

// made is the state of a layer while Stack makes it.
type made struct {
	name     string
	ctx      context.Context
	cancel   func()
	finished chan struct{} // closed when the snapshot exists, or the layer has failed with err
	err      error

	settledSet chan struct{} // closed after settled is set, at the latest when finished is closed
	settled    *commitment   // the pending commit of this layer, on which the next one can be settled; nil if it is committed or failed

	applied   chan struct{}    // closed when the layer is applied without its parent, and waits only for the layer below to be settled
	ready     chan *commitment // receives the pending commit, or nil if the layer must be applied again
	result    chan error       // receives the result of that commit
	received  bool             // commitEach has received from ready
	committed bool             // this call has committed it
}

func newMade(ctx context.Context, name string) *made {
	m := &made{name: name, finished: make(chan struct{}), settledSet: make(chan struct{}), applied: make(chan struct{}), ready: make(chan *commitment, 1), result: make(chan error, 1)}
	m.ctx, m.cancel = context.WithCancel(ctx)
	return m
}

func (m *made) end(err error) {
	m.err = err
	close(m.finished)
	m.settle(nil)
}

// settle lets the layer above continue. Only the first call has an effect.
func (m *made) settle(c *commitment) {
	select {
	case <-m.settledSet:
	default:
		m.settled = c
		close(m.settledSet)
	}
}

// wait waits for one of the layer's channels, and then returns the layer's error if it has failed.
func (m *made) wait(ctx context.Context, c chan struct{}) error {
	select {
	case <-c:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-m.finished:
		return m.err
	default:
		return nil
	}
}

// commitEach commits a layer when it is ready, together with the layers above that are applied by then. All layers
// below it exist. It returns when this layer exists or has failed.
func (s *Snapshotter) commitEach(m *made, above []*made) {
	for {
		select {
		case <-m.finished:
			return
		case c := <-m.ready:
			m.received = true
			if c == nil {
				continue
			}
			batch, commits := []*made{m}, []*commitment{c}
			for _, a := range above {
				if c = a.next(); c == nil {
					break
				}
				batch, commits = append(batch, a), append(commits, c)
			}
			err := m.ctx.Err()
			if err == nil {
				err = s.sync()
			}
			for i, c := range commits {
				failed := err
				if failed == nil {
					failed = s.publishCommit(batch[i].ctx, c)
				}
				c.release() // the next layer holds it as its parent
				batch[i].committed = failed == nil
				if errors.Is(failed, errChanged) {
					err = failed // the layers above must wait until it is committed
				}
				batch[i].result <- failed
			}
		}
	}
}

// next returns the pending commit of a layer, or nil if there is none yet. It waits only for a layer that is applied:
// settling it takes little time, now that the layer below is settled.
func (m *made) next() (c *commitment) {
	if m.received {
		select {
		case c = <-m.ready:
		default:
		}
		return c
	}
	select {
	case <-m.applied:
	default:
		return nil
	}
	select {
	case c = <-m.ready:
		m.received = true
	case <-m.finished:
	}
	return c
}

// commitInTurn prepares the commit of the snapshot key as the layer m, and waits until commitEach has done it.
func (s *Snapshotter) commitInTurn(m *made, key string, o CommitOptions, below *commitment) error {
	err := retry(func() error {
		c, err := s.prepareCommit(m.ctx, m.name, key, &o, below)
		if err != nil {
			return err
		}
		m.settle(c)
		m.ready <- c
		return <-m.result
	})
	if err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	return nil
}

func (s *Snapshotter) stack(l Layer, m, below *made, slots chan struct{}) {
	err := s.stackLayer(l, m, below, slots)
	if err != nil {
		m.cancel()
		err = fmt.Errorf("%s: %w", l.Name, err)
	}
	m.end(err)
}

func (s *Snapshotter) stackLayer(l Layer, m, below *made, slots chan struct{}) error {
	if exists, err := s.committed(l.Name); exists || err != nil {
		return err
	}
	form := s.driver.Whiteouts(s.dir)
	rebases := form == ArchiveForm || form != "" && below.name != ""
	if !rebases {
		if err := below.wait(m.ctx, below.finished); err != nil {
			return err
		}
	}
	unlock, err := s.lockName(m.ctx, l.Name)
	if err != nil {
		return err
	}
	defer unlock()
	if exists, err := s.committed(l.Name); exists || err != nil {
		return err
	}
	if rebases {
		err = s.stackOne(l, m, below, slots, true)
		if !errdefs.IsFailedPrecondition(err) {
			return err
		}
		m.ready <- nil
		if err := below.wait(m.ctx, below.finished); err != nil {
			return err
		}
	}
	return s.stackOne(l, m, below, slots, false)
}

// committed reports whether there is a committed snapshot of that name.
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

// stackOne makes one layer. The caller holds the lock on its name. If alone is true, the layer is applied without its
// parents and settled later.
func (s *Snapshotter) stackOne(l Layer, m, below *made, slots chan struct{}, alone bool) (err error) {
	ctx := m.ctx
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
	if errdefs.IsAlreadyExists(err) { // left by a killed process: no other holds the lock on the name
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
	p, err := s.place(t, alone)
	if err != nil {
		return err
	}
	if p.File != nil {
		defer p.File.Close()
	}
	if err := l.Apply(ctx, p); err != nil {
		return err
	}
	release()
	step("layer applied")
	o := CommitOptions{Parent: below.name}
	var pending *commitment
	if alone {
		close(m.applied)
		if err := below.wait(ctx, below.settledSet); err != nil {
			return err
		}
		pending = below.settled
	}
	if p.Unresolved != "" {
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
		p.File.Close() // an open mount could still be written to
	}
	err = s.commitInTurn(m, key, o, pending)
	if errdefs.IsAlreadyExists(err) { // another process made it without the lock
		return s.discard(key)
	}
	return err
}

// place returns where the layer of the snapshot t is to be applied.
func (s *Snapshotter) place(t Tree, alone bool) (p Place, err error) {
	form := s.driver.Whiteouts(s.dir)
	switch {
	case form == ArchiveForm:
		return Place{Dir: filepath.Join(t.Dir, LayerDir), Whiteouts: form}, nil
	case alone:
		return Place{Dir: t.FS(), Whiteouts: form, Unresolved: filepath.Join(t.Dir, "unresolved")}, nil
	}
	p = Place{Dir: t.FS(), Whiteouts: "remove"}
	if form != "" && len(t.Parents) > 0 {
		p.Dir = inherited
		p.File, err = s.driver.Open(t)
	}
	return p, err
}

// discard removes an unfinished snapshot, even if the context is done.
func (s *Snapshotter) discard(key string) error {
	if err := s.Remove(context.Background(), key); !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// lockName waits for the lock of processes that make the committed snapshot of that name.
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
		disk.Release(f) // its last holder has removed the file
	}
}

func (s *Snapshotter) lockOf(namespace, name string) string {
	if isDigest(name) {
		namespace = ""
	}
	return filepath.Join(s.dir, "locks", keyFile(namespace, name))
}

// stacking reports whether a process is filling the snapshot for Stack.
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

// sweepLocks deletes the lock files that no process holds.
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
