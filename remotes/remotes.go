// Package remotes reads from and writes to places that hold images: registries that speak the OCI distribution
// protocol, directories that are OCI image layouts, and anything else that a program dist-remote-NAME serves.
//
// A remote is selected by a locator (see [ParseLocator]) and holds objects, which are named by a tag or a digest.
// Resolving an object gives its descriptor, fetching it gives its bytes as a stream:
//
//	r, err := remotes.Open("docker.io/library/redis", remotes.Options{})
//	desc, err := r.Resolve(ctx, "latest")
//	body, err := r.Fetch(ctx, desc.Digest.String(), "mediatype:"+desc.MediaType)
//
// [Open] returns a [Registry], a [Layout] or a [Helper], all of which are a [Remote]. A request to a registry passes
// through these steps: firstHost chooses the registry or one of its mirrors, client.retry repeats what failed
// temporarily, client.once sends a request and client.judge turns the reply into an error or not, and
// roundTripper.RoundTrip checks where credentials and tokens go.
//
// Content that is fetched by digest is verified: the reader holds the last bytes back until the hash is known to match,
// and otherwise ends in an error of class DataLoss instead of io.EOF. Interrupted downloads resume, temporary failures
// are retried for a few seconds, and everything that a registry sends but blobs is bounded (see [MaxManifest]).
//
// Errors have classes of github.com/containerd/errdefs: InvalidArgument for a malformed locator or object, NotFound,
// Unauthenticated and PermissionDenied, DataLoss if the bytes are not those asked for, NotImplemented for obsolete
// formats, and Aborted, DeadlineExceeded or ResourceExhausted for temporary failures (a registry that is down or busy,
// a name that doesn't resolve, a download that keeps breaking off). TLS failures have no class.
package remotes

import (
	"context"
	"fmt"
	"io"
	"iter"
	"strings"
	"time"

	"distkit/batch"
	"distkit/refname"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Resolver turns a tag or digest into a descriptor.
type Resolver interface {
	Resolve(ctx context.Context, object string) (ocispec.Descriptor, error)
}

// Fetcher returns the content of a manifest or blob; id is a tag or digest. Hints have the form type:value, and unknown
// or malformed ones are ignored:
//
//   - mediatype:TYPE and size:BYTES say what is known about the object.
//   - url:URL is another address of a blob (see Options.FollowURLs).
//   - offset:N asks for the bytes from N on.
//   - range:A-B asks for the bytes from A to B, both included, or to the end if that comes first.
//
// An object that is fetched by digest and read from offset 0 to its end is verified before its last bytes are returned.
// Content from a later offset is checked for its length; its digest is verified only if the remote couldn't skip and
// sent everything. Of a range that ends early only the length is checked.
type Fetcher interface {
	Fetch(ctx context.Context, id string, hints ...string) (io.ReadCloser, error)
}

// FetcherFunc is a function that implements Fetcher.
type FetcherFunc func(ctx context.Context, id string, hints ...string) (io.ReadCloser, error)

// Fetch calls f.
func (f FetcherFunc) Fetch(ctx context.Context, id string, hints ...string) (io.ReadCloser, error) {
	return f(ctx, id, hints...)
}

// Pusher stores what it reads as a manifest or blob, and returns its descriptor. id is the digest or, for a manifest, a
// tag. Content is never stored under a digest that it doesn't have. If the remote has the digest already, Push
// succeeds; it then doesn't read a blob's content, and the size is that of the hint or what the remote says, or -1.
// Hints are mediatype:TYPE, size:BYTES and mount:REPOSITORY: another repository of the same registry that has the blob.
type Pusher interface {
	Push(ctx context.Context, id string, content io.Reader, hints ...string) (Pushed, error)
}

// Pushed is the result of a push: the descriptor, and how the remote got the object.
type Pushed struct {
	ocispec.Descriptor
	State State `json:"state"`
}

// State says how a remote got a pushed object.
type State string

// Exists: the remote had it. Mounted: it was taken from another repository of the remote. Stored: it was sent.
const (
	Exists  State = "exists"
	Mounted State = "mounted"
	Stored  State = "stored"
)

// Remote is a repository of a registry, or a directory.
type Remote interface {
	Resolver
	Fetcher
	Pusher
	// Tags lists the tags or names that Resolve accepts, as they arrive.
	Tags(ctx context.Context) iter.Seq2[string, error]
	// Referrers lists the manifests that have the digest as their subject and match the filter.
	Referrers(ctx context.Context, subject digest.Digest, filter ReferrerFilter) iter.Seq2[ocispec.Descriptor, error]
	// Delete deletes a tag, or a manifest and all its tags.
	Delete(ctx context.Context, id string) error
}

// ReferrerFilter selects referrers by their artifact type, unless it is empty, and by annotations, all of which must
// match.
type ReferrerFilter struct {
	ArtifactType string
	Annotations  map[string]string
}

func (f ReferrerFilter) selects(d ocispec.Descriptor) bool {
	for key, value := range f.Annotations {
		if got, ok := d.Annotations[key]; !ok || got != value {
			return false
		}
	}
	return f.ArtifactType == "" || f.ArtifactType == d.ArtifactType
}

// Options configure access to registries. The zero value is ready to use.
type Options struct {
	// PlainHTTP uses HTTP for a host whose scheme isn't configured. A loopback host with a port other than 443 is asked so anyway, unless it
	// has TLS settings.
	PlainHTTP bool
	// HostsDir lists directories, separated by colons, in the form of containerd's certs.d (HOST/hosts.toml and
	// certificates) or docker's. Empty means DefaultHostsDir.
	HostsDir string
	// AuthFile has credentials in the form of docker's config.json. Empty means that of the environment variable
	// REGISTRY_AUTH_FILE or, without that, docker's and podman's own files.
	AuthFile string
	// CA lists files with certificates of authorities to trust in addition to the system's.
	CA []string
	// Insecure accepts any server certificate.
	Insecure bool
	// Headers, of the form NAME: VALUE, are sent to the registry itself and to no other origin.
	Headers []string
	// MaxWait bounds the total wait for a registry that says when to come back (Retry-After). 0 means one minute; with
	// a negative value nothing is waited for.
	MaxWait time.Duration
	// Timeout is how long a host may be silent: before the header of its reply, and in total over all tries of an
	// operation. 0 means two minutes, or half a minute for a host that isn't the last one to try.
	Timeout time.Duration
	// Parts is the number of ranges of a large blob that are fetched concurrently, each over its own connection. 0 and
	// 1 mean one stream.
	Parts int
	// Streams is the number of objects that the caller reads or stores concurrently, each over its own connection. 0
	// means one.
	Streams int
	// Unverified means that the caller hashes blobs that it fetches by digest: only their length is checked. Manifests
	// are verified anyway.
	Unverified bool
	// FollowURLs makes Fetch try the addresses of url: hints for a blob that the registry doesn't have.
	FollowURLs bool
	// IfAbsent makes Push to a tag fail with AlreadyExists if the tag is another manifest's.
	IfAbsent bool
	// Notify, if not nil, is called with one line for each wait that a registry asks for, and for each warning.
	Notify func(string)
	// Debug, if not nil, is called with one line for each request and its reply, without secrets.
	Debug func(string)
}

// DefaultHostsDir lists where containerd, docker and podman keep the configuration of hosts. The user's own directory
// comes first: containers/certs.d in XDG_CONFIG_HOME, or in ~/.config.
const DefaultHostsDir = "/etc/containerd/certs.d:/etc/docker/certs.d:/etc/containers/certs.d"

// MaxManifest bounds the size of manifests, indexes and image configs in bytes.
const MaxManifest = 8 << 20

// Bounds of the objects and members in a document. They limit the memory for decoding: a million empty objects are only
// a few megabytes of JSON.
const (
	maxObjects = 1 << 17
	maxMembers = 1 << 19
)

// Open selects the remote of a locator. It doesn't check whether the remote exists.
func Open(locator string, o Options) (Remote, error) {
	l, err := ParseLocator(locator)
	if err != nil {
		return nil, err
	}
	if l.Path != "" {
		return &Layout{l.Path, o.IfAbsent, o.Unverified}, nil
	}
	if l.Helper != "" {
		return &Helper{l.Helper, l.Address, o}, nil
	}
	config, err := readHosts(l.Host, o)
	if err != nil {
		return nil, err
	}
	if config.helper != "" {
		return &Helper{config.helper, config.address + "/" + l.Name, o}, nil
	}
	return openRegistry(l, o, config.endpoints), nil
}

// hints are the parsed hints for an object. size is -1 if it is unknown.
type hints struct {
	mediaType, mount string
	size, offset     int64
	end              int64 // end of the wanted bytes, or toEnd; at least offset
	urls             []string
	isAbsent         bool // the remote was just asked for it, and doesn't have it
}

func parseHints(list []string) hints {
	h := hints{size: -1, end: toEnd}
	for _, s := range list {
		kind, value, ok := strings.Cut(s, ":")
		if !ok {
			continue
		}
		switch kind {
		case "mediatype":
			if isMediaType(value) {
				h.mediaType = value
			}
		case "url":
			h.urls = append(h.urls, value)
		case "mount":
			if refname.IsRepository(value) {
				h.mount = value
			}
		case "size":
			if n, err := batch.ParseNumber(value); err == nil {
				h.size = n
			}
		case "offset":
			if n, err := batch.ParseNumber(value); err == nil {
				h.offset = max(h.offset, n)
			}
		case "range":
			if begin, end, err := batch.ParseRange(value); err == nil {
				h.offset, h.end = max(h.offset, begin), end
			}
		}
	}
	if h.end >= 0 {
		h.end = max(h.end, h.offset) // a resumed range may have no bytes left
	}
	return h
}

// isMediaType reports whether s is a media type that can go into a header.
func isMediaType(s string) bool {
	major, minor, ok := strings.Cut(s, "/")
	if !ok || major == "" || minor == "" || len(s) > 255 {
		return false
	}
	return strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == ',' }) < 0
}

// Docker's media types, which are older than OCI's and equivalent.
const (
	mediaTypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	mediaTypeDockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	mediaTypeOctets         = "application/octet-stream"
)

// manifestTypes are the media types of manifests for the Accept header.
var manifestTypes = []string{
	ocispec.MediaTypeImageIndex, mediaTypeDockerIndex, ocispec.MediaTypeImageManifest, mediaTypeDockerManifest,
}

func isIndex(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageIndex || mediaType == mediaTypeDockerIndex
}

func isManifest(mediaType string) bool {
	return mediaType == ocispec.MediaTypeImageManifest || mediaType == mediaTypeDockerManifest
}

func isSchema1(mediaType string) bool {
	return strings.HasPrefix(mediaType, "application/vnd.docker.distribution.manifest.v1+")
}

func sizeString(n int64) string { return fmt.Sprintf("%d bytes", n) }
