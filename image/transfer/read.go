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

// Bounds for an archive: the number of entries, the total length of their names, the length of one name, and the length
// of a chain of links. An archive of a thousand images stays far below.
const (
	maxEntries = 1 << 17
	maxNames   = 16 << 20
	maxName    = 1 << 10
	maxLinks   = 16 // links in a row
)

// file is an entry of an archive that may be needed: a blob that is now stored, or a link.
type file struct {
	digest      digest.Digest // "" for a link
	size        int64
	compression compression.Format
	link        string // the name of the entry that it points at
}

// archive is what was read from an archive.
type archive struct {
	files  map[string]*file       // nil for skipped entries
	blobs  map[digest.Digest]bool // in blobs/
	layout []byte                 // oci-layout
	index  []byte                 // index.json
	docker []byte                 // manifest.json
	// referrers are the entries without a name in index.json that have a subject.
	referrers map[digest.Digest][]v1.Descriptor
}

// reader reads an archive into a store.
type reader struct {
	store   *content.Store // nil if nothing is to be stored
	buf     []byte
	entries int
	names   int
	listed  map[string]bool // names in manifest.json, if that came first
	archive
}

// readArchive stores the blobs of an archive while it reads, and verifies those that are named by their digest.
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

// entryName returns the name of an entry without a leading / or ./ and without a trailing slash. "." is the archive
// itself. A name with ".." is refused: it would never become a path here, but no image archive has one.
func entryName(name string) (string, error) {
	if len(name) > maxName {
		return "", invalid("entry %.40q…: the name has more than %d bytes", name, maxName)
	}
	if !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl) {
		return "", invalid("entry %q: the name has control characters or is not UTF-8", name)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", invalid("entry %q: the name leads outside the archive", name)
		}
	}
	return cmp.Or(strings.TrimLeft(path.Clean(name), "/"), "."), nil
}

// linkTarget returns the name of the entry that a link points at.
func linkTarget(h *tar.Header, name string) (string, error) {
	to := h.Linkname
	if len(to) > maxName || !utf8.ValidString(to) || strings.ContainsFunc(to, unicode.IsControl) {
		return "", invalid("entry %q: a link to %.40q", name, to)
	}
	if h.Typeflag == tar.TypeLink { // a hard link has the name of an entry
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
		return invalid("entry %q: not a name", h.Name)
	}
	if _, twice := r.files[name]; twice {
		return invalid("entry %q occurs twice", name)
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

// blobName returns the digest in the name of a blob file of an OCI layout.
func blobName(name string) (digest.Digest, bool) {
	rest, ok := strings.CutPrefix(name, v1.ImageBlobsDir+"/")
	if !ok {
		return "", false
	}
	alg, hex, ok := strings.Cut(rest, "/")
	dgst := digest.Digest(alg + ":" + hex)
	return dgst, ok && content.Validate(dgst) == nil
}

// tarBlock is the size of a tar header.
const tarBlock = 512

// plausible reports whether a file may be a layer or config that a manifest.json will name, so that other tars don't
// end up in the store. It considers the name and the beginning of the content.
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

// document reads a JSON file.
func document(name string, size int64, body io.Reader) ([]byte, error) {
	if size > image.MaxDocument {
		return nil, invalid("%s has %d bytes, more than %d", name, size, image.MaxDocument)
	}
	b := make([]byte, size)
	_, err := io.ReadFull(body, b)
	return b, entryError(name, err)
}

// entryError gives an error its class if an entry ends early.
func entryError(name string, err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return damaged("entry %q ends too early", name)
	}
	return err
}

// blob stores a file. It verifies the digest if that is known.
func (r *reader) blob(ctx context.Context, name string, size int64, dgst digest.Digest, body io.Reader) (file, error) {
	f := file{digest: dgst, size: size}
	if r.store == nil {
		return r.hashOnly(name, f, body)
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
	// Start over, whatever an earlier attempt left: all of it comes again.
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

// hashOnly is blob without a store: it computes the digest of a file.
func (r *reader) hashOnly(name string, f file, body io.Reader) (_ file, err error) {
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

// copy calls write with the content of a file, and returns the file's compression.
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

// writer opens an ingest: that of the digest, or else one for the entry's name, so that another import continues what
// an interrupted one left. Two imports at the same time don't wait for each other.
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

// find returns the blob of an entry, following links. A link to a missing entry is taken to point at the entry with the
// same base name at the top of the archive. DataLoss if there is none.
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
			return file{}, damaged("archive has no %q, the target of %q in %s", clean, name, dockerManifestsFile)
		case !ok:
			return file{}, damaged("archive has no %q, which is listed in %s", name, dockerManifestsFile)
		case f == nil:
			return file{}, invalid("%q, which is listed in %s, is neither a layer nor a config", name, dockerManifestsFile)
		case f.link != "":
			clean = f.link
		default:
			return *f, nil
		}
	}
	return file{}, invalid("entry %q: too many links", name)
}
