package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"distkit/disk/sys"
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Whiteouts is what becomes of a layer's marks of deletion.
type Whiteouts int

const (
	// Remove deletes what the target has of lower layers.
	Remove Whiteouts = iota
	// Overlay keeps the marks in the form that overlayfs reads in an upper directory: character
	// devices 0:0 and the attribute trusted.overlay.opaque.
	Overlay
	// OverlayUser is Overlay with user.overlay.opaque, for mounts with the userxattr option.
	OverlayUser
)

// Options change what Apply does. The zero value is the usual.
type Options struct {
	// ExpectDiffID is the diff ID that the layer must have, if any.
	ExpectDiffID digest.Digest
	Whiteouts    Whiteouts
	// Strict refuses a layer of which an owner, device or attribute can't be set, instead of
	// counting it in the Result. Without it an ordinary user's files and directories get the
	// attribute user.rootlesscontainers for the owner that they should have, unless that is 0:0.
	Strict bool
	// Workers is the number of goroutines that fill small files, by default as many as there
	// are processors, up to four.
	Workers int
	// Unresolved gets a record of all that the layer alone can't tell, for whoever gives it its
	// parents later: directories that it adds to but does not name, hard links to what it does
	// not hold, whiteouts. The form is that of dist-apply(1). It wants an overlay form of
	// whiteouts and an empty root.
	Unresolved io.Writer
}

// Result tells what a layer was.
type Result struct {
	DiffID    digest.Digest `json:"diffID"`
	Size      int64         `json:"size"`      // bytes of the uncompressed archive
	Entries   int64         `json:"entries"`   // whiteouts among them
	Whiteouts int64         `json:"whiteouts"` // opaque directories among them

	// Unset counts what could not be set, by kind, as in "owners" or "security attributes".
	Unset map[string]int64 `json:"-"`
}

const (
	whiteoutPrefix = ".wh."
	metaPrefix     = ".wh..wh."
	opaqueMarker   = ".wh..wh..opq"

	smallFile  = 64 << 10  // most bytes that are left to a worker
	batchBytes = 256 << 10 // of small files that go to a worker together
	batchFiles = 16

	// maxSparse bounds the sizes of a layer's sparse files together, in bytes: their holes cost
	// it nothing, but whoever reads through them time. A gzip layer of 1 GiB can hold as much.
	maxSparse = 1 << 40
)

// Apply writes the layer in r, plain or compressed with gzip or zstd, into the directory root,
// as the image specification's "Applying Changesets" says, and reads r to its end.
//
// A layer that is corrupt, ends too early or has another diff ID than the one expected is
// ErrDataLoss; one with entries that no layer may have is ErrInvalidArgument, as is a root
// that is no directory; a compression or a whiteout that can't be had is ErrNotImplemented.
// After an error the directory holds a part of the layer. Nothing is synced to disk: that is up
// to who gives the directory a name that promises its content.
//
// A directory that the layer adds to without naming it keeps its times; one that is missing
// gets mode 0755. The umask plays no role. Apply returns after ctx is done as soon as a read
// of r that is under way returns; to let Apply end such a read, r may have SetReadDeadline.
func Apply(ctx context.Context, root string, r io.Reader, opts Options) (Result, error) {
	if opts.ExpectDiffID != "" {
		if err := opts.ExpectDiffID.Validate(); err != nil {
			return Result{}, refused("expected diff ID %q: %w", opts.ExpectDiffID, err)
		}
		if a := opts.ExpectDiffID.Algorithm(); a != digest.SHA256 {
			return Result{}, errclass.As(fmt.Errorf("expected diff ID: algorithm %s is not supported", a), errdefs.ErrNotImplemented)
		}
	}
	t, err := newTree(root)
	switch {
	case errors.Is(err, unix.ENOTDIR):
		return Result{}, refused("open %s: %w", root, err)
	case err != nil:
		return Result{}, fmt.Errorf("open %s: %w", root, err)
	}
	switch opts.Whiteouts {
	case Overlay:
		t.opaque = "trusted.overlay.opaque"
	case OverlayUser:
		t.opaque = "user.overlay.opaque"
	}
	if opts.Unresolved != nil {
		if err := t.reportTo(opts.Unresolved); err != nil {
			t.abandon()
			return Result{}, fmt.Errorf("apply to %s: %w", root, err)
		}
	}
	if opts.Workers <= 0 {
		opts.Workers = min(4, runtime.GOMAXPROCS(0))
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	a := &applier{
		ctx: ctx, cancel: cancel, opts: opts, tree: t,
		in:     newStream(ctx, r),
		work:   make(chan *batch, 2),
		spare:  make(chan *batch, opts.Workers+3),
		buffer: make([]byte, chunkSize),
	}
	for range cap(a.spare) {
		a.spare <- &batch{}
	}
	for range opts.Workers {
		a.workers.Go(a.worker)
	}

	err = a.run()
	if err != nil {
		cancel(err)
	}
	if a.batch != nil {
		a.send()
	}
	close(a.work)
	a.workers.Wait()
	if werr := a.workerErr(); werr != nil && (err == nil || errors.Is(err, context.Canceled)) {
		err = werr
	}
	if err != nil {
		t.abandon()
		if d, ok := r.(interface{ SetReadDeadline(time.Time) error }); ok {
			_ = d.SetReadDeadline(time.Now())
		}
		<-a.in.done
		return Result{}, err
	}
	<-a.in.done
	if err := t.finish(); err != nil {
		return Result{}, fmt.Errorf("set times of directories: %w", err)
	}
	if err := t.flushReport(); err != nil {
		return Result{}, err
	}
	a.result.DiffID, a.result.Size = a.diffID(), a.in.size
	a.result.Unset = a.unset
	return a.result, nil
}

// An applier takes the entries of a layer one by one. Whatever has a name is created, linked
// and removed by run alone and in the order of the archive; workers only fill files that are
// open. So the order means the same for any number of workers.
type applier struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	opts   Options
	tree   *tree
	in     *stream
	tar    *tar.Reader
	buffer []byte
	result Result
	sparse int64 // bytes that sparse files have had so far, holes and all

	batch       *batch
	work, spare chan *batch
	workers     sync.WaitGroup

	mu     sync.Mutex
	failed error // of a worker
	unset  map[string]int64
}

// A batch is small files on their way to a worker.
type batch struct {
	data  []byte
	files []pending
}

type pending struct {
	file
	from, to int // in the batch's data
}

// A file is what remains to be done to a file that is open.
type file struct {
	fd     int
	name   string
	owner  bool
	uid    uint32
	gid    uint32
	mode   uint32
	chmod  bool
	isDir  bool
	times  [2]unix.Timespec
	xattrs []xattr
}

type xattr struct {
	name  string
	value []byte
}

func (a *applier) diffID() digest.Digest {
	return digest.NewDigest(digest.SHA256, a.in.digest)
}

func (a *applier) run() error {
	a.tar = tar.NewReader(a.in)
	for {
		if err := a.ctx.Err(); err != nil {
			return err
		}
		a.in.watch = (a.in.offset + blockSize - 1) / blockSize * blockSize
		h, err := a.tar.Next()
		if err == io.EOF {
			return a.end()
		}
		if err != nil {
			return a.readError(err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		a.result.Entries++
		if !a.tree.isToApplyAgain() {
			if err := a.entry(h); err != nil && !a.tree.mayBeWell(h, err) {
				return fmt.Errorf("entry %s: %w", quote(h.Name), err)
			}
		}
		if _, err := io.Copy(io.Discard, a.tar); err != nil { // what the entry has no use for
			return fmt.Errorf("entry %s: %w", quote(h.Name), a.readError(err))
		}
	}
}

// readError gives an error of the archive's reader its class.
func (a *applier) readError(err error) error {
	switch {
	case a.in.err != nil && a.in.err != io.EOF:
		return a.in.err
	case errors.Is(err, io.ErrUnexpectedEOF), err == io.EOF:
		if a.in.offset >= blockSize {
			return dataLoss("layer ends too early, after %d bytes", a.in.offset)
		}
		fallthrough
	case errors.Is(err, tar.ErrHeader) && a.in.offset <= blockSize:
		return dataLoss("not a layer: neither a tar archive nor one compressed with gzip or zstd")
	}
	return dataLoss("read layer, at the entry at byte %d: %w", a.in.watch, err)
}

// end is the end of the archive.
func (a *applier) end() error {
	if a.batch != nil { // it need not wait for what trails the archive
		a.send()
	}
	if err := a.in.drain(); err != nil {
		return err
	}
	if a.in.offset == 0 {
		return a.readError(io.EOF)
	}
	if want := a.opts.ExpectDiffID; want != "" {
		<-a.in.done
		if got := a.diffID(); got != want {
			return dataLoss("diff ID mismatch: got %s, expected %s", got, want)
		}
		return nil
	}
	if !a.in.marked {
		return dataLoss("layer ends without the end-of-archive marker, after %d bytes", a.in.offset)
	}
	return nil
}

func (a *applier) entry(h *tar.Header) error {
	if len(h.Name) > maxPath {
		return refused("name of %d bytes", len(h.Name))
	}
	name := clean(h.Name)
	if strings.HasPrefix(name, metaPrefix) && name != opaqueMarker {
		return nil // what aufs kept for itself at the top of a layer
	}
	if name == "" {
		if h.Typeflag != tar.TypeDir {
			return nil
		}
		return a.directory(h, a.tree.root, false)
	}
	parent, base := split(name)
	if strings.HasPrefix(base, whiteoutPrefix) {
		return a.whiteout(parent, base)
	}
	switch h.Typeflag {
	case tar.TypeDir:
		d, err := a.tree.lookup(parent)
		if err != nil {
			return err
		}
		c, made, err := a.tree.mkdir(d, base, uint32(h.Mode)&0o7777)
		if err != nil {
			return err
		}
		return a.directory(h, c, made)
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return a.regular(h, parent, base)
	case tar.TypeLink:
		return a.link(h, parent, base)
	case tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return a.special(h, parent, base)
	}
	return refused("type %q is not supported", h.Typeflag)
}

// directory gives an open directory what the entry says; made tells that it was made for it.
func (a *applier) directory(h *tar.Header, d *dir, made bool) error {
	t := a.tree
	t.touch(d)
	t.named(d.path)
	f, err := newFile(h)
	if err != nil {
		return err
	}
	f.fd = d.fd
	if made {
		f.chmod = false
		f.owner = !d.owns(f)
		if !t.privileged {
			f.mode |= 0o700 // until the directory is closed
		}
	} else {
		if err := clearXattrs(d.fd); err != nil {
			return err
		}
		d.setMode = false
		if !t.privileged && f.mode&0o700 != 0o700 {
			d.mode, d.setMode = f.mode, true
			f.mode |= 0o700
		}
	}
	if !made || len(f.xattrs) > 0 {
		d.probed = false
	}
	d.times = &[2]unix.Timespec{f.times[0], f.times[1]}
	return a.attributes(&f)
}

// owns tells whether a file made in d, or d if it was just made, has the owner it shall have.
func (d *dir) owns(f file) bool {
	return d.probed && f.uid == d.uid && f.gid == d.gid
}

// newFile takes an entry's attributes. All are to be set.
func newFile(h *tar.Header) (file, error) {
	const most = int(^uint32(0)) // itself means "leave it" to chown
	if h.Uid < 0 || h.Uid >= most || h.Gid < 0 || h.Gid >= most {
		return file{}, refused("owner %d:%d is out of range", h.Uid, h.Gid)
	}
	access := h.AccessTime
	if access.Before(h.ModTime) {
		access = h.ModTime
	}
	f := file{
		fd: -1, name: h.Name,
		owner: true, uid: uint32(h.Uid), gid: uint32(h.Gid),
		chmod: true, mode: uint32(h.Mode) & 0o7777, isDir: h.Typeflag == tar.TypeDir,
		times: [2]unix.Timespec{timespec(access), timespec(h.ModTime)},
	}
	var err error
	if len(h.PAXRecords) > 0 {
		f.xattrs, err = xattrs(h.PAXRecords)
	}
	return f, err
}

func timespec(t time.Time) unix.Timespec {
	return unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
}

// create makes the new file base in d with make, in place of what is there.
func (a *applier) create(d *dir, base string, make func() error) error {
	err := make()
	if errors.Is(err, unix.EEXIST) {
		if err := a.tree.remove(d, base); err != nil {
			return err
		}
		err = make()
	}
	if err == nil {
		a.tree.wrote(d, base)
	}
	return err
}

func (a *applier) regular(h *tar.Header, parent, base string) error {
	f, err := newFile(h)
	if err != nil {
		return err
	}
	if sparse(h) {
		if h.Size > maxSparse-a.sparse {
			return refused("sparse files have more than %d bytes together", int64(maxSparse))
		}
		a.sparse += h.Size
	}
	d, err := a.tree.lookup(parent)
	if err != nil {
		return err
	}
	a.tree.probe(d)
	err = a.create(d, base, func() (err error) {
		f.fd, err = sys.Openat(d.fd, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, f.mode&0o777)
		return err
	})
	if err != nil {
		return err
	}
	if d.acl {
		if err := dropACLs(f.fd, accessACL); err != nil {
			_ = unix.Close(f.fd)
			return err
		}
	}
	f.owner = !d.owns(f)
	f.chmod = f.mode&0o7000 != 0 || f.mode&^d.mask != f.mode
	if h.Size <= smallFile && !sparse(h) {
		return a.small(f, int(h.Size))
	}
	if err := a.large(h, f.fd); err != nil {
		_ = unix.Close(f.fd)
		return err
	}
	return a.complete(&f)
}

// small leaves a file to the workers.
func (a *applier) small(f file, size int) error {
	if a.batch != nil && (len(a.batch.data)+size > batchBytes || len(a.batch.files) == batchFiles) {
		a.send()
	}
	if a.batch == nil {
		a.batch = <-a.spare
		if a.batch.data == nil {
			a.batch.data = make([]byte, 0, batchBytes)
		}
	}
	b := a.batch
	from := len(b.data)
	b.data = b.data[:from+size]
	b.files = append(b.files, pending{f, from, from + size})
	if _, err := io.ReadFull(a.tar, b.data[from:]); err != nil {
		return a.readError(err)
	}
	return nil
}

func (a *applier) send() {
	a.work <- a.batch
	a.batch = nil
}

// worker fills files. Once the layer has failed it only closes them.
func (a *applier) worker() {
	for b := range a.work {
		for i := range b.files {
			p := &b.files[i]
			if a.ctx.Err() != nil {
				_ = unix.Close(p.fd)
				continue
			}
			err := writeAll(p.fd, b.data[p.from:p.to])
			if err != nil {
				_ = unix.Close(p.fd)
			} else {
				err = a.complete(&p.file)
			}
			if err != nil {
				a.fail(fmt.Errorf("entry %s: %w", quote(p.name), err))
			}
		}
		clear(b.files)
		b.data, b.files = b.data[:0], b.files[:0]
		a.spare <- b
	}
}

func (a *applier) fail(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.failed == nil {
		a.failed = err
		a.cancel(err)
	}
}

func (a *applier) workerErr() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.failed
}

// sparse tells whether the entry is an archive's form of a file with holes.
func sparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// large copies an entry's content, and leaves holes where a sparse one has them.
func (a *applier) large(h *tar.Header, fd int) error {
	holes := sparse(h)
	if holes { // refuses at once a size that the file system can't have
		if err := sys.Ftruncate(fd, h.Size); err != nil {
			return err
		}
	}
	var at int64
	for {
		n, err := io.ReadFull(a.tar, a.buffer)
		b := a.buffer[:n]
		if holes {
			if werr := writeSparse(fd, b, at); werr != nil {
				return werr
			}
		} else if werr := writeAll(fd, b); werr != nil {
			return werr
		}
		at += int64(n)
		if n < len(a.buffer) && at == h.Size {
			return nil
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return a.readError(io.ErrUnexpectedEOF)
		}
		if err != nil {
			return a.readError(err)
		}
		if err := a.ctx.Err(); err != nil {
			return err
		}
	}
}

func writeSparse(fd int, b []byte, at int64) error {
	for len(b) > 0 {
		n := min(len(b), len(zeros))
		if !bytes.Equal(b[:n], zeros[:n]) {
			for done := 0; done < n; {
				m, err := unix.Pwrite(fd, b[done:n], at+int64(done))
				if err != nil && !errors.Is(err, unix.EINTR) {
					return err
				}
				done += max(m, 0)
			}
		}
		b, at = b[n:], at+int64(n)
	}
	return nil
}

func writeAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		b = b[max(n, 0):]
	}
	return nil
}

// complete sets the attributes of a file that is written, and closes it.
func (a *applier) complete(f *file) error {
	err := a.attributes(f)
	if err == nil {
		if err = futimens(f.fd, &f.times); err != nil {
			err = fmt.Errorf("set times: %w", err)
		}
	}
	if cerr := unix.Close(f.fd); cerr != nil && err == nil {
		err = cerr
	}
	return err
}

// attributes sets owner, mode and extended attributes, in this order: a change of owner takes
// the set-user-ID bit and capabilities away.
func (a *applier) attributes(f *file) error {
	if f.owner {
		f.chmod = f.chmod || f.mode&0o6000 != 0
		if err := a.owned(f, sys.Fchown(f.fd, int(f.uid), int(f.gid))); err != nil {
			return err
		}
	}
	xattrs := f.xattrs
	if !a.tree.privileged && !a.opts.Strict {
		xattrs = slices.DeleteFunc(xattrs, func(x xattr) bool { return x.name == ownerAttribute })
		if f.uid != 0 || f.gid != 0 {
			xattrs = append(xattrs, xattr{ownerAttribute, encodeOwner(f.uid, f.gid)})
		}
	}
	// Attributes of an ordinary user's file want it to be writable.
	locked := !a.tree.privileged && len(xattrs) > 0 && f.mode&0o200 == 0
	if locked {
		if err := sys.Fchmod(f.fd, f.mode|0o200); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	} else if f.chmod {
		if err := sys.Fchmod(f.fd, f.mode); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	if err := a.setXattrs(xattrs, func(x xattr) error { return sys.Fsetxattr(f.fd, x.name, x.value, 0) }); err != nil {
		return err
	}
	if locked {
		if err := sys.Fchmod(f.fd, f.mode); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	return nil
}

// owned settles a change of a file's owner that ended with err. If it was not permitted, the file gets no set-ID bits either:
// they would give away the rights of the owner that it has kept.
func (a *applier) owned(f *file, err error) error {
	if err == nil {
		return nil
	}
	if err := a.settle("owners", "set owner", err); err != nil {
		return err
	}
	if f.isDir || f.mode&0o6000 == 0 {
		return nil
	}
	f.mode &^= 0o6000
	return a.settle("set-ID bits", "set mode", unix.EPERM)
}

func (a *applier) setXattrs(xattrs []xattr, set func(xattr) error) error {
	for _, x := range xattrs {
		class, _, _ := strings.Cut(x.name, ".")
		if rest, ok := overlayName(x.name); ok {
			// A layer may not speak to overlayfs. In overlay form overlayfs itself can hide the
			// name, else nothing can; and what is reported is to be what the latter gives.
			if a.tree.opaque == "" || a.tree.report != nil {
				if err := a.settle("overlay attributes", "set attribute "+quote(x.name), unix.EPERM); err != nil {
					return err
				}
				continue
			}
			x.name = class + ".overlay.overlay." + rest
		}
		if err := a.settle(class+" attributes", "set attribute "+quote(x.name), set(x)); err != nil {
			return err
		}
	}
	return nil
}

func overlayName(name string) (string, bool) {
	for _, p := range []string{"trusted.overlay.", "user.overlay."} {
		if rest, ok := strings.CutPrefix(name, p); ok {
			return rest, true
		}
	}
	return "", false
}

// settle counts what can't be set here, for want of rights or of support, unless that is
// refused.
func (a *applier) settle(kind, verb string, err error) error {
	if err == nil {
		return nil
	}
	err = fmt.Errorf("%s: %w", verb, err)
	switch {
	case a.opts.Strict:
		return err
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOTSUP):
	case kind == "owners" && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EACCES)): // not mapped in a user namespace
	default:
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.unset == nil {
		a.unset = map[string]int64{}
	}
	a.unset[kind]++
	return nil
}

// xattrs are the extended attributes among PAX records, as star and GNU tar write them or,
// where those are missing, libarchive.
func xattrs(records map[string]string) ([]xattr, error) {
	var list []xattr
	for k, v := range records {
		if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
			list = append(list, xattr{name, []byte(v)})
		} else if escaped, ok := strings.CutPrefix(k, "LIBARCHIVE.xattr."); ok {
			name, err := url.PathUnescape(escaped)
			if err != nil {
				return nil, refused("attribute %s: %w", quote(escaped), err)
			}
			if _, both := records["SCHILY.xattr."+name]; both {
				continue
			}
			value, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(v, "="))
			if err != nil {
				return nil, refused("attribute %s: %w", quote(name), err)
			}
			list = append(list, xattr{name, value})
		}
	}
	slices.SortFunc(list, func(a, b xattr) int { return strings.Compare(a.name, b.name) })
	return list, nil
}

// clearXattrs takes from a directory of a lower layer the attributes that the layer's own entry
// would have to name.
func clearXattrs(fd int) error {
	buf := make([]byte, 1<<10)
	n, err := unix.Flistxattr(fd, buf)
	if errors.Is(err, unix.ERANGE) {
		buf = make([]byte, 64<<10)
		n, err = unix.Flistxattr(fd, buf)
	}
	if err != nil {
		return ignore(err, unix.ENOTSUP)
	}
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if _, overlay := overlayName(name); name == "" || overlay || name == "security.selinux" {
			continue
		}
		if err := unix.Fremovexattr(fd, name); err != nil {
			if err := ignore(err, unix.EPERM, unix.ENOTSUP, unix.ENODATA, unix.EACCES); err != nil {
				return fmt.Errorf("remove attribute %s: %w", quote(name), err)
			}
		}
	}
	return nil
}

func (a *applier) link(h *tar.Header, parent, base string) error {
	if h.Linkname == "" || len(h.Linkname) > maxPath {
		return refused("hard link to a name of %d bytes", len(h.Linkname))
	}
	target := clean(h.Linkname)
	if target == clean(h.Name) {
		return refused("hard link to itself")
	}
	tparent, tbase := split(target)
	if target == "" {
		return refused("hard link to the root directory")
	}
	t := a.tree
	from, err := t.existing(tparent)
	if target, ok := t.below(tbase, err); ok {
		return a.unresolvedLink(parent, base, target)
	}
	if err != nil {
		return refused("hard link to %s: %w", quote(h.Linkname), err)
	}
	d, err := t.lookup(parent, from)
	if err != nil {
		return err
	}
	if from == d && tbase == base {
		return refused("hard link to itself")
	}
	// Nothing is removed to make way for a link that can't be.
	var st unix.Stat_t
	err = sys.Fstatat(from.fd, tbase, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		if target, ok := t.below(tbase, &missing{dir: from}); ok {
			return a.unresolvedLink(parent, base, target)
		}
	}
	if err == nil && t.opaque != "" && isWhiteout(&st) {
		err = unix.ENOENT
	}
	if err != nil {
		return refused("hard link to %s: %w", quote(h.Linkname), err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return refused("hard link to the directory %s", quote(h.Linkname))
	}
	if p := join(d.path, base); from.path == p || strings.HasPrefix(from.path, p+"/") {
		return refused("hard link to %s, which it would replace", quote(h.Linkname))
	}
	if err := a.create(d, base, func() error { return sys.Linkat(from.fd, tbase, d.fd, base, 0) }); err != nil {
		return err
	}
	if source := join(from.path, tbase); t.report != nil && has(t.report.links, t.hash(source)) {
		t.report.links[t.hash(join(d.path, base))] = struct{}{}
		t.record(recordLink, join(d.path, base), source)
	}
	return nil
}

// special makes what is not opened: symbolic links, devices and fifos.
func (a *applier) special(h *tar.Header, parent, base string) error {
	f, err := newFile(h)
	if err != nil {
		return err
	}
	d, err := a.tree.lookup(parent)
	if err != nil {
		return err
	}
	if a.tree.opaque != "" && h.Typeflag == tar.TypeChar && h.Devmajor == 0 && h.Devminor == 0 {
		return a.whiteoutDevice(d, base)
	}
	a.tree.probe(d)
	make := func() error { return sys.Symlinkat(h.Linkname, d.fd, base) }
	if h.Typeflag != tar.TypeSymlink {
		kind := map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[h.Typeflag]
		var device uint64
		if h.Typeflag != tar.TypeFifo {
			if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
				return refused("device number %d:%d is out of range", h.Devmajor, h.Devminor)
			}
			device = unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
		}
		make = func() error { return sys.Mknodat(d.fd, base, kind|f.mode&0o777, int(device)) }
	}
	err = a.create(d, base, make)
	if errors.Is(err, unix.EPERM) && (h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock) {
		return a.settle("devices", "create device", err)
	}
	if err != nil {
		return err
	}
	if !d.owns(f) {
		if err := a.owned(&f, sys.Fchownat(d.fd, base, int(f.uid), int(f.gid), unix.AT_SYMLINK_NOFOLLOW)); err != nil {
			return err
		}
	}
	// The directory by descriptor, and in it the entry itself whatever it is.
	path := fmt.Sprintf("/proc/self/fd/%d/%s", d.fd, base)
	if d.acl && h.Typeflag != tar.TypeSymlink {
		if err := ignore(unix.Lremovexattr(path, accessACL), unix.ENODATA, unix.ENOTSUP); err != nil {
			return fmt.Errorf("remove %s: %w", accessACL, err)
		}
	}
	if h.Typeflag != tar.TypeSymlink && (f.mode&0o7000 != 0 || f.mode&^d.mask != f.mode) {
		if err := chmodat(d.fd, base, f.mode); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	if err := a.setXattrs(f.xattrs, func(x xattr) error { return sys.Lsetxattr(path, x.name, x.value, 0) }); err != nil {
		return err
	}
	if err := sys.UtimesNanoAt(d.fd, base, f.times[:], unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}

// whiteoutDevice is for an entry that overlayfs would take for a whiteout, and that it does not
// let anybody create: nothing is at its place.
func (a *applier) whiteoutDevice(d *dir, base string) error {
	if err := a.settle("devices", "create device", unix.EPERM); err != nil {
		return err
	}
	if err := a.tree.remove(d, base); err != nil || a.tree.isOpaque(d.path) {
		return err
	}
	if err := sys.Mknodat(d.fd, base, unix.S_IFCHR, 0); err != nil {
		return fmt.Errorf("create whiteout: %w", err)
	}
	a.tree.wrote(d, base)
	a.tree.record(recordWhiteout, join(d.path, base), "")
	return nil
}

// chmodat changes the mode of what is at base, never of what a symbolic link there leads to.
func chmodat(fd int, base string, mode uint32) error {
	err := sys.Fchmodat(fd, base, mode, unix.AT_SYMLINK_NOFOLLOW)
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) {
		return err
	}
	p, err := sys.Openat(fd, base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(p)
	return unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", p), mode)
}

func (a *applier) whiteout(parent, base string) error {
	t := a.tree
	name := strings.TrimPrefix(base, whiteoutPrefix)
	if name == "" || name == "." || name == ".." {
		return refused("whiteout of %q", name)
	}
	a.result.Whiteouts++
	d, err := t.lookup(parent)
	if err != nil {
		return err
	}
	t.touch(d)
	switch {
	case base == opaqueMarker && t.opaque == "":
		return t.hide(d)
	case base == opaqueMarker && d == t.root && t.report != nil:
		t.again("", "all lower layers are hidden")
		return nil
	case base == opaqueMarker && d == t.root:
		return errclass.As(errors.New("overlayfs can't hide all lower layers: apply it with whiteouts removed"), errdefs.ErrNotImplemented)
	case base == opaqueMarker:
		return t.makeOpaque(d)
	case strings.HasPrefix(base, metaPrefix):
		return nil // of aufs's own, which no layer has
	case t.opaque == "":
		return t.whiteout(d, name)
	}
	if t.isOpaque(d.path) {
		return nil // a device would be of no use, and seen in a listing
	}
	err = sys.Mknodat(d.fd, name, unix.S_IFCHR, 0)
	if !errors.Is(err, unix.EEXIST) {
		if err != nil {
			return fmt.Errorf("create whiteout: %w", err)
		}
		t.record(recordWhiteout, join(d.path, name), "")
		return nil
	}
	// This layer has the name itself, so hides it unless both are directories.
	var st unix.Stat_t
	if err := sys.Fstatat(d.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	c, _, err := t.child(d, name)
	if err != nil {
		return err
	}
	return t.makeOpaque(c)
}
