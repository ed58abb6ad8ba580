package transfer

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"strings"
	"unicode"
	"unicode/utf8"

	"distkit/content"
	"distkit/image"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Bounds on what an archive makes us remember: entries, bytes of all their names, bytes of
// one name. An archive of a thousand images stays far below.
const (
	maxEntries = 1 << 17
	maxNames   = 16 << 20
	maxName    = 1 << 10
	maxLinks   = 16 // one leads to the next
)

// maxWindow is the largest zstd window accepted, in bytes: that of zstd --long.
const maxWindow = 128 << 20

// file is an entry of an archive that may matter: a blob that is stored now, or a link.
type file struct {
	digest      digest.Digest // "" of a link, and of what was passed over
	size        int64
	compression string // "", "gzip" or "zstd"
	link        string // the name of the entry it leads to
}

// archive is what was read of an archive.
type archive struct {
	files  map[string]file
	blobs  map[digest.Digest]bool // under blobs/
	layout []byte                 // oci-layout
	index  []byte                 // index.json
	docker []byte                 // manifest.json
}

// source reads the archive's bytes, until ctx is done. It remembers a failure to read, which
// is another thing than an archive that is damaged.
type source struct {
	ctx context.Context
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	if err := s.ctx.Err(); err != nil {
		s.err = err
		return 0, err
	}
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// zeroCounter counts the zero bytes at the end of what it has read: an archive ends with a
// block of them at least, and package tar takes one without for whole.
type zeroCounter struct {
	r io.Reader
	n int
}

func (z *zeroCounter) Read(p []byte) (int, error) {
	n, err := z.r.Read(p)
	rest := len(bytes.TrimRight(p[:n], "\x00"))
	if rest > 0 {
		z.n = 0
	}
	z.n = min(z.n+n-rest, math.MaxInt32)
	return n, err
}

// reader reads one archive into a store.
type reader struct {
	store  *content.Store
	src    *source
	tar    *tar.Reader
	end    *zeroCounter
	buf    []byte
	names  int
	listed map[string]bool // what manifest.json names, where it came first
	archive
}

// readArchive stores the blobs of an archive as they pass, each verified against its name if
// that is its digest.
func readArchive(ctx context.Context, store *content.Store, in io.Reader) (*archive, error) {
	r := &reader{store: store, src: &source{ctx: ctx, r: in}, buf: make([]byte, 256<<10)}
	r.files, r.blobs = map[string]file{}, map[digest.Digest]bool{}
	plain, stop, err := decompress(r.src)
	if err != nil {
		return nil, r.failed(err)
	}
	defer stop()
	r.end = &zeroCounter{r: plain}
	r.tar = tar.NewReader(r.end)
	for n := 0; ; n++ {
		r.end.n = 0
		h, err := r.tar.Next()
		if err == io.EOF {
			break
		}
		if errors.Is(err, tar.ErrHeader) && n == 0 {
			return nil, r.failed(invalid("no tar archive"))
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return nil, r.failed(err)
		}
		if n >= maxEntries {
			return nil, invalid("archive has more than %d entries", maxEntries)
		}
		if err := r.entry(ctx, h); err != nil {
			return nil, err
		}
		// Not left to Next, so that the zeros it reads are no entry's.
		if _, err := io.CopyBuffer(io.Discard, onlyReader{r.tar}, r.buf); err != nil {
			return nil, r.failed(err)
		}
	}
	if r.end.n < 512 {
		return nil, damaged("archive is truncated: it has no end-of-archive marker")
	}
	// To the end, so that the producer upstream is not killed and checksums are looked at.
	if _, err := io.CopyBuffer(io.Discard, onlyReader{plain}, r.buf); err != nil {
		return nil, r.failed(err)
	}
	return &r.archive, nil
}

type onlyReader struct{ io.Reader }

// decompress reads gzip, zstd or what is neither.
func decompress(src *source) (io.Reader, func(), error) {
	b := bufio.NewReaderSize(src, 64<<10)
	head, err := b.Peek(4)
	if err != nil && err != io.EOF {
		return nil, nil, err
	}
	if len(head) == 0 {
		return nil, nil, invalid("no archive: there is nothing to read")
	}
	r, stop, err := inflate(b, compression(head))
	return r, stop, err
}

// compression tells how bytes that begin like this are compressed: "gzip", "zstd" or "".
func compression(head []byte) string {
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b, 8}):
		return "gzip"
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return "zstd"
	}
	return ""
}

func inflate(r io.Reader, compression string) (io.Reader, func(), error) {
	switch compression {
	case "gzip":
		z, err := gzip.NewReader(r)
		return z, func() {}, err
	case "zstd":
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	}
	return r, func() {}, nil
}

// failed makes an error of reading the archive one that tells what is wrong with it.
func (r *reader) failed(err error) error {
	switch {
	case r.src.err != nil:
		return fmt.Errorf("read archive: %w", r.src.err)
	case errdefs.IsInvalidArgument(err):
		return err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return damaged("archive is truncated")
	}
	return damaged("archive is damaged: %w", err)
}

// entryName is the name of an entry, without ./ before it or a slash behind. What is absolute
// or leads upwards is refused, though it would never become a path here: whoever made that
// had no image in mind.
func entryName(name string) (string, error) {
	if len(name) > maxName {
		return "", invalid("entry %.40q…: a name of more than %d bytes", name, maxName)
	}
	if !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl) {
		return "", invalid("entry %q: a name with control characters or what is not UTF-8", name)
	}
	if strings.HasPrefix(name, "/") {
		return "", invalid("entry %q: an absolute name", name)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", invalid("entry %q: a name that leads outside the archive", name)
		}
	}
	return path.Clean(name), nil
}

// linkTarget is the name of the entry that a link leads to.
func linkTarget(h *tar.Header, name string) (string, error) {
	to := h.Linkname
	if len(to) > maxName || !utf8.ValidString(to) || strings.ContainsFunc(to, unicode.IsControl) {
		return "", invalid("entry %q: a link to %.40q", name, to)
	}
	if !path.IsAbs(to) {
		if h.Typeflag == tar.TypeSymlink {
			to = path.Join(path.Dir(name), to)
		} else {
			to = path.Clean(to)
		}
	}
	if path.IsAbs(to) || to == "" || to == ".." || strings.HasPrefix(to, "../") {
		return "", invalid("entry %q: a link to %q, outside the archive", name, h.Linkname)
	}
	return to, nil
}

func (r *reader) entry(ctx context.Context, h *tar.Header) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := entryName(h.Name)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeDir {
		return nil
	}
	if name == "." {
		return invalid("entry %q: a name that is none", h.Name)
	}
	if _, twice := r.files[name]; twice {
		return invalid("entry %q is there twice", name)
	}
	if r.names += len(name) + len(h.Linkname); r.names > maxNames {
		return invalid("names of entries take more than %d bytes", maxNames)
	}
	var f file
	switch h.Typeflag {
	case tar.TypeReg:
		for k := range h.PAXRecords {
			if strings.HasPrefix(k, "GNU.sparse.") {
				return invalid("entry %q is sparse", name)
			}
		}
		f, err = r.regular(ctx, name, h.Size)
	case tar.TypeSymlink, tar.TypeLink:
		f.link, err = linkTarget(h, name)
	case tar.TypeGNUSparse:
		err = invalid("entry %q is sparse", name)
	default:
		err = invalid("entry %q is neither a file nor a directory or link", name)
	}
	r.files[name] = f
	return err
}

func (r *reader) regular(ctx context.Context, name string, size int64) (file, error) {
	var err error
	switch name {
	case v1.ImageLayoutFile:
		r.layout, err = r.document(name, size)
		return file{}, err
	case v1.ImageIndexFile:
		r.index, err = r.document(name, size)
		return file{}, err
	case dockerManifestsFile:
		if r.docker, err = r.document(name, size); err == nil {
			r.listed, err = listed(r.docker)
		}
		return file{}, err
	}
	if dgst, ok := blobName(name); ok {
		return r.blob(ctx, name, size, dgst)
	}
	if r.layout == nil && (plausible(name) || r.listed[name]) {
		return r.blob(ctx, name, size, "")
	}
	return file{}, nil
}

// blobName is the digest that a file of an OCI layout is named by.
func blobName(name string) (digest.Digest, bool) {
	rest, ok := strings.CutPrefix(name, v1.ImageBlobsDir+"/")
	if !ok {
		return "", false
	}
	alg, hex, ok := strings.Cut(rest, "/")
	dgst := digest.Digest(alg + ":" + hex)
	return dgst, ok && content.Validate(dgst) == nil
}

// plausible tells whether a file may be a layer or config that a manifest.json will name, so
// that a tar of something else does not end up in the store.
func plausible(name string) bool {
	if strings.Count(name, "/") > 2 {
		return false
	}
	base := path.Base(name)
	switch path.Ext(base) {
	case ".tar", ".json", ".gz", ".tgz", ".zst":
		return true
	}
	base = strings.TrimPrefix(base, "sha256:")
	return len(base) == 64 && strings.Trim(base, "0123456789abcdef") == ""
}

// document reads a file that is JSON.
func (r *reader) document(name string, size int64) ([]byte, error) {
	if size > image.MaxDocument {
		return nil, invalid("%s has %d bytes, more than %d", name, size, image.MaxDocument)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(r.tar, b); err != nil {
		return nil, r.failed(err)
	}
	return b, nil
}

// blob stores a file; its digest is verified if it is known.
func (r *reader) blob(ctx context.Context, name string, size int64, dgst digest.Digest) (file, error) {
	f := file{digest: dgst, size: size}
	w, err := r.writer(ctx, name, size, dgst)
	if errdefs.IsAlreadyExists(err) {
		r.blobs[dgst] = true
		return f, nil
	}
	if err != nil {
		return f, fmt.Errorf("store %s: %w", name, err)
	}
	defer w.Abort()
	// Whatever an earlier attempt left, all of it comes again.
	if err := w.Truncate(0); err != nil {
		return f, fmt.Errorf("store %s: %w", name, err)
	}
	for n := int64(0); n < size; {
		k, err := io.ReadFull(r.tar, r.buf[:min(int64(len(r.buf)), size-n)])
		if err != nil {
			return f, r.failed(err)
		}
		if n == 0 {
			f.compression = compression(r.buf[:k])
		}
		if _, err := w.Write(r.buf[:k]); err != nil {
			return f, fmt.Errorf("store %s: %w", name, err)
		}
		n += int64(k)
	}
	if dgst == "" {
		f.digest = w.Digest()
	} else {
		r.blobs[dgst] = true
	}
	if err := w.Commit(ctx, size, dgst, nil); err != nil && !errdefs.IsAlreadyExists(err) {
		return f, fmt.Errorf("store %s: %w", name, err)
	}
	return f, nil
}

// writer opens an ingest: the digest's, or else one that the name is known by, so that what
// one killed import left is taken up by the next. Two imports at a time don't wait for each
// other.
func (r *reader) writer(ctx context.Context, name string, size int64, dgst digest.Digest) (*content.Writer, error) {
	ref := "import:" + name
	if dgst != "" {
		return r.store.BlobWriter(ctx, ref, size, dgst, true)
	}
	for n := 2; ; n++ {
		w, err := r.store.Writer(ctx, ref, 0, "")
		if !errdefs.IsUnavailable(err) || n > 1000 {
			return w, err
		}
		ref = fmt.Sprintf("import:%s#%d", name, n)
	}
}

// find returns the blob that an entry is, through links. DataLoss if there is none.
func (a *archive) find(name string) (file, error) {
	clean, err := entryName(name)
	if err != nil {
		return file{}, err
	}
	for range maxLinks {
		f, ok := a.files[clean]
		switch {
		case !ok:
			return f, damaged("archive has no %q, which %s names", name, dockerManifestsFile)
		case f.link != "":
			clean = f.link
		case f.digest == "":
			return f, invalid("%q, which %s names, is no layer and no config", name, dockerManifestsFile)
		default:
			return f, nil
		}
	}
	return file{}, invalid("entry %q: links without end", name)
}
