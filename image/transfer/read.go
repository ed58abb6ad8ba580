package transfer

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"path"
	"strings"
	"unicode"
	"unicode/utf8"

	"distkit/compression"
	"distkit/content"
	"distkit/image"

	"github.com/containerd/errdefs"
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

// file is an entry of an archive that may matter: a blob that is stored now, or a link.
type file struct {
	digest      digest.Digest // "" of a link
	size        int64
	compression compression.Format
	link        string // the name of the entry it leads to
}

// archive is what was read of an archive.
type archive struct {
	files  map[string]*file       // nil for what was passed over
	blobs  map[digest.Digest]bool // under blobs/
	layout []byte                 // oci-layout
	index  []byte                 // index.json
	docker []byte                 // manifest.json
	// referrers are the entries of index.json without a name that have a subject.
	referrers map[digest.Digest][]v1.Descriptor
}

// reader reads one archive into a store.
type reader struct {
	store   *content.Store // nil if nothing is to be stored
	buf     []byte
	entries int
	names   int
	listed  map[string]bool // what manifest.json names, where it came first
	archive
}

// readArchive stores the blobs of an archive as they pass, each verified against its name if
// that is its digest.
func readArchive(ctx context.Context, store *content.Store, from Source) (*archive, error) {
	r := &reader{store: store, buf: make([]byte, 256<<10)}
	r.files, r.blobs = map[string]*file{}, map[digest.Digest]bool{}
	err := from(ctx, func(h *tar.Header, body io.Reader) error {
		if r.entries++; r.entries > maxEntries {
			return invalid("archive has more than %d entries", maxEntries)
		}
		return r.entry(ctx, h, body)
	})
	return &r.archive, err
}

// entryName is the name of an entry, relative to the archive: without / or ./ before it or a slash behind. "." is the
// archive itself. What leads upwards is refused, though it would never become a path here: whoever made that had no
// image in mind.
func entryName(name string) (string, error) {
	if len(name) > maxName {
		return "", invalid("entry %.40q…: a name of more than %d bytes", name, maxName)
	}
	if !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl) {
		return "", invalid("entry %q: a name with control characters or what is not UTF-8", name)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", invalid("entry %q: a name that leads outside the archive", name)
		}
	}
	return cmp.Or(strings.TrimLeft(path.Clean(name), "/"), "."), nil
}

// linkTarget is the name of the entry that a link leads to.
func linkTarget(h *tar.Header, name string) (string, error) {
	to := h.Linkname
	if len(to) > maxName || !utf8.ValidString(to) || strings.ContainsFunc(to, unicode.IsControl) {
		return "", invalid("entry %q: a link to %.40q", name, to)
	}
	if h.Typeflag == tar.TypeLink { // to the name of an entry
		to = strings.TrimLeft(to, "/")
	} else if !path.IsAbs(to) {
		to = path.Join(path.Dir(name), to)
	}
	to = path.Clean(to)
	if h.Linkname == "" || path.IsAbs(to) || to == ".." || strings.HasPrefix(to, "../") {
		return "", invalid("entry %q: a link to %q, outside the archive", name, h.Linkname)
	}
	return to, nil
}

func (r *reader) entry(ctx context.Context, h *tar.Header, body io.Reader) error {
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
		f, err = r.regular(ctx, name, h.Size, body)
	case tar.TypeSymlink, tar.TypeLink:
		f.link, err = linkTarget(h, name)
	case tar.TypeGNUSparse:
		err = invalid("entry %q is sparse", name)
	default:
		err = invalid("entry %q is neither a file nor a directory or link", name)
	}
	r.files[name] = nil
	if f != (file{}) {
		r.files[name] = &f
	}
	return err
}

func (r *reader) regular(ctx context.Context, name string, size int64, body io.Reader) (file, error) {
	var err error
	switch name {
	case v1.ImageLayoutFile:
		r.layout, err = document(name, size, body)
		return file{}, err
	case v1.ImageIndexFile:
		r.index, err = document(name, size, body)
		return file{}, err
	case dockerManifestsFile:
		if r.docker, err = document(name, size, body); err == nil {
			r.listed, err = listed(r.docker)
		}
		return file{}, err
	}
	if dgst, ok := blobName(name); ok {
		return r.blob(ctx, name, size, dgst, body)
	}
	if r.layout != nil {
		return file{}, nil
	}
	b := bufio.NewReaderSize(body, tarBlock)
	head, err := b.Peek(tarBlock)
	if err != nil && err != io.EOF {
		return file{}, err
	}
	if plausible(name, size, head) || r.listed[name] {
		return r.blob(ctx, name, size, "", b)
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

// tarBlock is the size of a tar's header.
const tarBlock = 512

// plausible tells whether a file may be a layer or config that a manifest.json will name, so
// that a tar of something else does not end up in the store. What a layer holds tells as much as its name.
func plausible(name string, size int64, head []byte) bool {
	if strings.Count(name, "/") > 2 {
		return false
	}
	base := path.Base(name)
	switch path.Ext(base) {
	case ".tar", ".json", ".gz", ".tgz", ".zst":
		return true
	}
	base = strings.TrimPrefix(base, "sha256:")
	if len(base) == 64 && strings.Trim(base, "0123456789abcdef") == "" {
		return true
	}
	isTar := len(head) == tarBlock && string(head[257:262]) == "ustar"
	isConfig := size <= image.MaxDocument && bytes.HasPrefix(head, []byte("{")) && base != "json" && base != "repositories"
	return isTar || isConfig || compression.Sniff(head) != compression.None
}

// document reads a file that is JSON.
func document(name string, size int64, body io.Reader) ([]byte, error) {
	if size > image.MaxDocument {
		return nil, invalid("%s has %d bytes, more than %d", name, size, image.MaxDocument)
	}
	b := make([]byte, size)
	_, err := io.ReadFull(body, b)
	return b, entryError(name, err)
}

// entryError gives the early end of an entry its class.
func entryError(name string, err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return damaged("entry %q ends too early", name)
	}
	return err
}

// blob stores a file; its digest is verified if it is known.
func (r *reader) blob(ctx context.Context, name string, size int64, dgst digest.Digest, body io.Reader) (file, error) {
	f := file{digest: dgst, size: size}
	if r.store == nil {
		return r.look(name, f, body)
	}
	w, err := r.writer(ctx, name, size, dgst)
	if errdefs.IsAlreadyExists(err) {
		r.blobs[dgst] = true
		head := r.buf[:min(size, compression.HeadSize)]
		_, err = io.ReadFull(body, head)
		f.compression = compression.Sniff(head)
		return f, entryError(name, err)
	}
	if err != nil {
		return f, fmt.Errorf("store %s: %w", name, err)
	}
	defer w.Abort()
	// Whatever an earlier attempt left, all of it comes again.
	if err := w.Truncate(0); err != nil {
		return f, fmt.Errorf("store %s: %w", name, err)
	}
	store := func(p []byte) error {
		_, err := w.Write(p)
		return err
	}
	if f.compression, err = r.copy(name, size, body, store); err != nil {
		return f, err
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

// look is blob without a store: it finds the digest of a file.
func (r *reader) look(name string, f file, body io.Reader) (_ file, err error) {
	if f.digest != "" {
		r.blobs[f.digest] = true
		return f, nil
	}
	h := digest.Canonical.Digester()
	f.compression, err = r.copy(name, f.size, body, func(p []byte) error {
		_, err := h.Hash().Write(p)
		return err
	})
	f.digest = h.Digest()
	return f, err
}

// copy gives write all of a file, and tells how the file is compressed.
func (r *reader) copy(name string, size int64, body io.Reader, write func([]byte) error) (format compression.Format, err error) {
	for n := int64(0); n < size; {
		k, err := io.ReadFull(body, r.buf[:min(int64(len(r.buf)), size-n)])
		if err != nil {
			return "", entryError(name, err)
		}
		if n == 0 {
			format = compression.Sniff(r.buf[:k])
		}
		if err := write(r.buf[:k]); err != nil {
			return "", fmt.Errorf("store %s: %w", name, err)
		}
		n += int64(k)
	}
	return format, nil
}

// writer opens an ingest: the digest's, or else one that the name is known by, so that what
// one killed import left is taken up by the next. Two imports at a time don't wait for each
// other.
func (r *reader) writer(ctx context.Context, name string, size int64, dgst digest.Digest) (*content.Writer, error) {
	ref := "import:" + name
	if dgst != "" {
		return r.store.Writer(ctx, ref, size, dgst, content.Wait)
	}
	for n := 2; ; n++ {
		w, err := r.store.Writer(ctx, ref, 0, "")
		if !errdefs.IsUnavailable(err) || n > 1000 {
			return w, err
		}
		ref = fmt.Sprintf("import:%s#%d", name, n)
	}
}

// find returns the blob that an entry is, through links. A link that leads to no entry is taken for one to the entry of
// the same base name at the top of the archive. DataLoss if there is none.
func (a *archive) find(name string) (file, error) {
	clean, err := entryName(name)
	if err != nil {
		return file{}, err
	}
	for n := range maxLinks {
		f, ok := a.files[clean]
		if !ok && n > 0 {
			f, ok = a.files[path.Base(clean)]
			ok = ok && f != nil && f.link == ""
		}
		switch {
		case !ok && n > 0:
			return file{}, damaged("archive has no %q, to which %q leads, which %s names", clean, name, dockerManifestsFile)
		case !ok:
			return file{}, damaged("archive has no %q, which %s names", name, dockerManifestsFile)
		case f == nil:
			return file{}, invalid("%q, which %s names, is no layer and no config", name, dockerManifestsFile)
		case f.link != "":
			clean = f.link
		default:
			return *f, nil
		}
	}
	return file{}, invalid("entry %q: links without end", name)
}
