// Package remotes talks to where content comes from and goes to: registries that speak the
// OCI distribution protocol, and directories that are OCI image layouts.
//
// A remote is selected by a locator (see ParseLocator) and answers for objects: tags and
// digests. It is resolved to a descriptor, and its bytes are fetched as a stream:
//
//	r, err := remotes.Open("docker.io/library/redis", remotes.Options{})
//	desc, err := r.Resolve(ctx, "latest")
//	body, err := r.Fetch(ctx, desc.Digest.String(), "mediatype:"+desc.MediaType)
//
// What is fetched by digest is verified: the reader keeps the last bytes back until the hash
// is known to be right, and ends in an error of class DataLoss instead of io.EOF where it is
// not. Downloads go on where they were cut, temporary failures are tried again for a few
// seconds, and what a registry sends besides blobs is bounded (see MaxManifest).
//
// Errors carry the classes of github.com/containerd/errdefs: InvalidArgument for a wrong
// locator or object, NotFound, Unauthenticated and PermissionDenied, DataLoss where bytes are
// not what was asked for, NotImplemented for obsolete formats, and Aborted, DeadlineExceeded
// or ResourceExhausted for failures that may be gone later (a registry that is down or busy,
// a name that does not resolve, a download that stays cut). TLS failures have no class.
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

// Resolver turns a tag or digest into the descriptor of what it names.
type Resolver interface {
	Resolve(ctx context.Context, object string) (ocispec.Descriptor, error)
}

// Fetcher gives the bytes of a manifest or blob, id being a tag or digest. Hints are of the
// form type:value: mediatype:TYPE and size:BYTES say what is known of the object, url:URL where
// else a blob is (see Options.FollowURLs), offset:N asks for the bytes from N on, and range:A-B for those from A to B, both
// included, or to the end if that comes first. Hints that are unknown or not of that form are ignored.
//
// Read from offset 0 to its end, an object asked for by digest is verified before its last bytes are
// given. From a later offset its length is, and its digest only where the remote could not
// skip and sent all of it. Of a range that ends earlier the length alone is.
type Fetcher interface {
	Fetch(ctx context.Context, id string, hints ...string) (io.ReadCloser, error)
}

// FetcherFunc is a function that is a Fetcher.
type FetcherFunc func(ctx context.Context, id string, hints ...string) (io.ReadCloser, error)

// Fetch calls f.
func (f FetcherFunc) Fetch(ctx context.Context, id string, hints ...string) (io.ReadCloser, error) {
	return f(ctx, id, hints...)
}

// Pusher stores what it reads as a manifest or blob, id being the digest or, of a manifest,
// a tag, and tells its descriptor. Nothing is stored under a digest that it does not have.
// What is there already under its digest is success; a blob is not read then, and its size is that of the
// hint or what the remote tells of it, -1 for nothing. Hints are mediatype:TYPE,
// size:BYTES and mount:REPOSITORY, another repository of the same registry that has the blob.
type Pusher interface {
	Push(ctx context.Context, id string, content io.Reader, hints ...string) (Pushed, error)
}

// Pushed is what a remote has after a push, and how it came to have it.
type Pushed struct {
	ocispec.Descriptor
	State State `json:"state"`
}

// State of what was pushed.
type State string

// What was pushed was there already, was taken from another repository, or was sent.
const (
	Exists  State = "exists"
	Mounted State = "mounted"
	Stored  State = "stored"
)

// Remote is one repository of a registry, or one directory.
type Remote interface {
	Resolver
	Fetcher
	Pusher
	// Tags lists what there is to resolve beside digests, while it comes.
	Tags(ctx context.Context) iter.Seq2[string, error]
	// Referrers lists the manifests whose subject is the digest and which the filter selects.
	Referrers(ctx context.Context, subject digest.Digest, filter ReferrerFilter) iter.Seq2[ocispec.Descriptor, error]
	// Delete deletes a tag, or a manifest with all tags that it has.
	Delete(ctx context.Context, id string) error
}

// ReferrerFilter selects referrers: of a type of artifact, where that is not empty, and with all of the annotations.
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

// Options say how registries are reached. The zero value is ready to use.
type Options struct {
	// PlainHTTP speaks HTTP to a host whose scheme no configuration tells. Loopback hosts
	// are spoken to in HTTP anyway.
	PlainHTTP bool
	// HostsDir are directories of containerd's form, HOST/hosts.toml and certificates, or
	// of docker's certs.d, separated by colons. Empty: DefaultHostsDir.
	HostsDir string
	// AuthFile has credentials in the form of docker's config.json. Empty: that of the
	// environment variable REGISTRY_AUTH_FILE, else docker's own and podman's.
	AuthFile string
	// CA are files with certificates of authorities that are trusted beside the system's.
	CA []string
	// Insecure takes certificates of servers without verifying them.
	Insecure bool
	// Headers are sent to the registry itself, as NAME: VALUE, and to no other origin.
	Headers []string
	// MaxWait is how long is waited in all when a registry says when to come back (Retry-After):
	// 0 is one minute, a negative one not at all.
	MaxWait time.Duration
	// Timeout is how long a host may send nothing: before the header of its reply, and in all over the
	// tries of one operation. 0 is two minutes, and half a minute for a host that has another one
	// after it.
	Timeout time.Duration
	// Parts is how many ranges of a large blob are fetched at the same time, over a
	// connection each: 0 and 1 mean one stream.
	Parts int
	// Streams is how many objects the caller reads or stores at the same time, over a connection each. 0 stands for one.
	Streams int
	// Unverified leaves it to the caller to hash blobs that are fetched by digest: their
	// length alone is checked. Manifests are verified anyway.
	Unverified bool
	// FollowURLs lets Fetch ask the addresses of url: hints for a blob that the registry does not have.
	FollowURLs bool
	// IfAbsent has Push under a tag or name fail with AlreadyExists if that names another manifest.
	IfAbsent bool
	// Notify is told of waits that a registry asked for, in one line.
	Notify func(string)
	// Debug is told of each request and its reply, without secrets, in one line.
	Debug func(string)
}

// DefaultHostsDir is where containerd, docker and podman keep the configuration of hosts. The user's own directory
// comes before them: containers/certs.d in XDG_CONFIG_HOME, or in ~/.config.
const DefaultHostsDir = "/etc/containerd/certs.d:/etc/docker/certs.d:/etc/containers/certs.d"

// MaxManifest bounds manifests, indexes and image configs in bytes.
const MaxManifest = 8 << 20

// What may be in a document, which bounds the memory that decoding takes: a million empty
// objects are a few megabytes of JSON.
const (
	maxObjects = 1 << 17
	maxMembers = 1 << 19
)

// Open selects the remote of a locator. It is not yet looked whether it is there.
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

// hints are what a caller told of an object; size is -1 where it is not known.
type hints struct {
	mediaType, mount string
	size, offset     int64
	end              int64 // of the bytes that are wanted, or toEnd; at least offset
	urls             []string
	isAbsent         bool // the remote has just been asked, and does not have it
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
		h.end = max(h.end, h.offset) // what is left of a range to go on with may be nothing
	}
	return h
}

// isMediaType keeps what would break a header out of it.
func isMediaType(s string) bool {
	major, minor, ok := strings.Cut(s, "/")
	if !ok || major == "" || minor == "" || len(s) > 255 {
		return false
	}
	return strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == ',' }) < 0
}

// Descriptor media types of docker's, which predate and equal those of OCI.
const (
	mediaTypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	mediaTypeDockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	mediaTypeOctets         = "application/octet-stream"
)

// manifestTypes is every type of manifest that is asked for, in one Accept header.
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
