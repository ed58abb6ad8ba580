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
// order, and done is called with each name once it is there, in order too. All that can be committed at a time share one sync of the
// file system.
//
// A layer that fails leaves nothing, and neither do those above it; those below are there. Where done fails, the layers above are
// called off, but those that were committed at the same time are there. The error is that of the lowest. A process that is killed leaves an active snapshot with
// [TemporaryLabel], which the next that makes this layer removes.
//
// Where the layers turn out not to be any, once the driver puts them together (ErrInvalidArgument, ErrDataLoss), those that Stack has
// made are removed.
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
		// What fails takes those above with it.
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
				stop() // those above
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

// withdraw removes what of layers this process has committed, the highest first, as far as nobody uses it.
func (s *Snapshotter) withdraw(ctx context.Context, layers []*made) {
	r := s.Remover()
	for _, m := range slices.Backward(layers) {
		if m.ours {
			if err := r.Remove(ctx, m.name); err != nil && !errdefs.IsNotFound(err) {
				return
			}
		}
	}
}

func (s *Snapshotter) complete(ctx context.Context, a Archiver, name string) error {
	below, held, err := s.hold(ctx, name)
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

// made is a layer of a stack on its way.
type made struct {
	name   string
	ctx    context.Context
	cancel func()
	is     chan struct{} // closed when it is there, or has failed with err
	err    error

	known   chan struct{} // closed once settled is set, and after is
	settled *commitment   // what the layers above are settled on; nil if that is committed, or there is none

	applied chan struct{}    // closed once it is applied without its parent: then it waits only until the layer below is settled
	ready   chan *commitment // takes what is to be committed, or nil where it must be applied again
	verdict chan error       // what has become of that
	asked   bool             // commitEach has received something from ready
	ours    bool             // commitEach has committed it
}

func newMade(ctx context.Context, name string) *made {
	m := &made{name: name, is: make(chan struct{}), known: make(chan struct{}), applied: make(chan struct{}), ready: make(chan *commitment, 1), verdict: make(chan error, 1)}
	m.ctx, m.cancel = context.WithCancel(ctx)
	return m
}

func (m *made) end(err error) {
	m.err = err
	close(m.is)
	m.settle(nil)
}

// settle lets the layers above go on. Only its first call counts.
func (m *made) settle(c *commitment) {
	select {
	case <-m.known:
	default:
		m.settled = c
		close(m.known)
	}
}

// wait waits for one of the layer's channels.
func (m *made) wait(ctx context.Context, c chan struct{}) error {
	select {
	case <-c:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-m.is:
		return m.err
	default:
		return nil
	}
}

// commitEach commits the layer, below which all are there, once it is ready, and with it those above that are applied by then. It
// returns when the layer is there or has failed.
func (s *Snapshotter) commitEach(m *made, above []*made) {
	for {
		select {
		case <-m.is:
			return
		case c := <-m.ready:
			m.asked = true
			if c == nil {
				continue
			}
			those, commits := []*made{m}, []*commitment{c}
			for _, a := range above {
				if c = a.next(); c == nil {
					break
				}
				those, commits = append(those, a), append(commits, c)
			}
			err := m.ctx.Err()
			if err == nil {
				err = s.sync()
			}
			for i, c := range commits {
				failed := err
				if failed == nil {
					failed = s.publishCommit(those[i].ctx, c)
				}
				c.release() // the next one holds it as its parent
				those[i].ours = failed == nil
				if errors.Is(failed, errChanged) {
					err = failed // those above wait until it is committed, too
				}
				those[i].verdict <- failed
			}
		}
	}
}

// next returns what is to be committed of a layer, or nil if that is not known yet. It waits only for a layer that is applied, and
// settled now that those below are.
func (m *made) next() (c *commitment) {
	if m.asked {
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
		m.asked = true
	case <-m.is:
	}
	return c
}

// commitInTurn has the snapshot key committed as the layer m by [Snapshotter.commitEach].
func (s *Snapshotter) commitInTurn(m *made, key string, o CommitOptions, below *commitment) error {
	err := retry(func() error {
		c, err := s.ready(m.ctx, m.name, key, &o, below)
		if err != nil {
			return err
		}
		m.settle(c)
		m.ready <- c
		return <-m.verdict
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
	if there, err := s.committed(l.Name); there || err != nil {
		return err
	}
	form := s.driver.Whiteouts(s.dir)
	rebases := form == ArchiveForm || form != "" && below.name != ""
	if !rebases {
		if err := below.wait(m.ctx, below.is); err != nil {
			return err
		}
	}
	unlock, err := s.lockName(m.ctx, l.Name)
	if err != nil {
		return err
	}
	defer unlock()
	if there, err := s.committed(l.Name); there || err != nil {
		return err
	}
	if rebases {
		err = s.stackOne(l, m, below, slots, true)
		if !errdefs.IsFailedPrecondition(err) {
			return err
		}
		m.ready <- nil
		if err := below.wait(m.ctx, below.is); err != nil {
			return err
		}
	}
	return s.stackOne(l, m, below, slots, false)
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
	case s.driver.Whiteouts(s.dir) == ArchiveForm:
		p = Place{Dir: filepath.Join(t.Dir, LayerDir), Whiteouts: ArchiveForm}
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
	var pending *commitment
	if alone {
		close(m.applied)
		if err := below.wait(ctx, below.known); err != nil {
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
		p.File.Close() // what is mounted could still be written to
	}
	err = s.commitInTurn(m, key, o, pending)
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
