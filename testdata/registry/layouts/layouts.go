// Package layouts serves a tree of OCI image layouts as a registry. The layout in <dir>/<repository> is that
// repository, and its ref.name annotations are the tags.
//
// The registry is olareg, changed so that it sees at once what other programs write into the layouts. olareg alone
// looks at an index.json at most once a second, and remembers that a repository did not exist.
package layouts

import (
	"bytes"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/olareg/olareg"
	"github.com/olareg/olareg/config"
)

// Handler is a registry that serves one directory.
type Handler struct {
	dir      string
	readOnly bool

	mu    sync.Mutex
	repos map[string]*repository
}

// New serves dir, which may be empty or missing. Pushes, deletions and olareg's own files are written to the layouts,
// unless readOnly is set. Blobs are never swept.
func New(dir string, readOnly bool) *Handler {
	return &Handler{dir: dir, readOnly: readOnly, repos: map[string]*repository{}}
}

type repository struct {
	mu     sync.Mutex
	server *olareg.Server
	seen   fs.FileInfo // index.json as this server last wrote it
}

func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name, kind := Split(r.URL.Path)
	h.mu.Lock()
	repo := h.repos[name]
	if repo == nil {
		repo = &repository{}
		h.repos[name] = repo
	}
	h.mu.Unlock()

	repo.mu.Lock()
	index := filepath.Join(h.dir, filepath.FromSlash(name), "index.json")
	if now, _ := os.Stat(index); repo.server == nil || !same(repo.seen, now) {
		repo.server, repo.seen = h.open(), now
	}
	server := repo.server
	if kind == "uploads" && r.Method == http.MethodPost {
		// The first upload creates the index. That is no change by another program, on which the uploads under way
		// would be dropped.
		server.ServeHTTP(w, r)
		repo.seen, _ = os.Stat(index)
		repo.mu.Unlock()
		return
	}
	if kind == "blobs" || kind == "uploads" {
		repo.mu.Unlock()
		server.ServeHTTP(w, r)
		return
	}
	// The request may write the index, so no other request may look at it at the same time.
	answer := &response{header: w.Header(), status: http.StatusOK}
	server.ServeHTTP(answer, r)
	repo.seen, _ = os.Stat(index)
	repo.mu.Unlock()
	w.WriteHeader(answer.status)
	_, _ = w.Write(answer.body.Bytes())
}

// open returns a server without timers. It sweeps nothing, and need not be closed.
func (h *Handler) open() *olareg.Server {
	yes := true
	return olareg.New(config.Config{
		Storage: config.ConfigStorage{
			StoreType: config.StoreDir, RootDir: h.dir, ReadOnly: &h.readOnly,
			GC: config.ConfigGC{Frequency: -1, GracePeriod: -1},
		},
		API: config.ConfigAPI{
			DeleteEnabled: &yes,
			Blob:          config.ConfigAPIBlob{DeleteEnabled: &yes},
			Manifest:      config.ConfigAPIManifest{SparseImage: &yes, SparseIndex: &yes},
		},
	})
}

func same(a, b fs.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size()
}

// response keeps a response in memory until the repository's lock is released.
type response struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (r *response) Header() http.Header         { return r.header }
func (r *response) WriteHeader(status int)      { r.status = status }
func (r *response) Write(p []byte) (int, error) { return r.body.Write(p) }

// Split returns the repository that a request's path names, and the kind of endpoint: manifests, blobs, uploads, tags,
// referrers, or other.
func Split(path string) (repo, kind string) {
	rest, ok := strings.CutPrefix(path, "/v2/")
	if !ok {
		return "", "other"
	}
	for _, k := range []struct{ sep, kind string }{
		{"/blobs/uploads", "uploads"}, {"/blobs/", "blobs"}, {"/manifests/", "manifests"},
		{"/tags/", "tags"}, {"/referrers/", "referrers"},
	} {
		if i := strings.LastIndex(rest, k.sep); i > 0 {
			return rest[:i], k.kind
		}
	}
	return "", "other"
}
