package remotes

import (
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	// The algorithms of digests that OCI registers.
	_ "crypto/sha256"
	_ "crypto/sha512"
)

// Locator selects a remote: Host and Name of a repository, Path of a directory, or the Address
// that a Helper is to be told.
type Locator struct {
	Host string // as in names of images: docker.io, localhost:5000
	Name string // library/redis
	Path string

	Helper, Address string
}

// String is the locator as it is written.
func (l Locator) String() string {
	if l.Path != "" {
		return l.Path
	}
	if l.Helper != "" {
		return l.Helper + "::" + l.Address
	}
	return l.Host + "/" + l.Name
}

// ParseLocator reads host/path, normalised as docker does (docker.io/redis is
// docker.io/library/redis), a path, which begins with "/", "./" or "../", or NAME::ADDRESS for
// the program dist-remote-NAME. Errors are of class InvalidArgument and say what to write.
func ParseLocator(s string) (Locator, error) {
	bad := func(format string, a ...any) (Locator, error) {
		return Locator{}, classf(errdefs.ErrInvalidArgument, "locator %q: "+format, append([]any{s}, a...)...)
	}
	switch {
	case s == "":
		return Locator{}, classf(errdefs.ErrInvalidArgument, "the locator is empty: write host/path, as docker.io/library/redis")
	case strings.ContainsRune(s, 0):
		return bad("has a NUL byte")
	case isPath(s):
		return Locator{Path: s}, nil
	}
	if name, address, ok := strings.Cut(s, "::"); ok && isHelperName(name) {
		if address == "" || address[0] == '-' || strings.ContainsAny(address, "\r\n") {
			return bad("is for dist-remote-%s, and has no address: write %s::ADDRESS", name, name)
		}
		return Locator{Helper: name, Address: address}, nil
	}
	if scheme, rest, ok := strings.Cut(s, "://"); ok {
		return bad("a locator has no %s://: write %s", scheme, rest)
	}
	host, path, ok := strings.Cut(s, "/")
	if !ok || host != "localhost" && !strings.ContainsAny(host, ".:") {
		hub := s
		if !ok {
			hub = "library/" + s
		}
		if !ok && strings.ContainsAny(s, ".:") || s == "localhost" {
			return bad("has no repository: write host/path, as %s/NAME", s)
		}
		return bad("has no host: write docker.io/%s, or ./%s for a directory", hub, s)
	}
	if path == "" {
		return bad("has no repository: write host/path, as %s/NAME", host)
	}
	if host == "index.docker.io" {
		host = hub
	}
	object := ""
	if i := strings.IndexAny(path, ":@"); i >= 0 {
		path, object = path[:i], path[i:]
	}
	if host == hub && !strings.Contains(path, "/") {
		path = "library/" + path
	}
	switch {
	case !isHost(host):
		return bad("%s is invalid as a host", host)
	case len(path) > maxRepository:
		return bad("the repository has more than %d characters", maxRepository)
	case strings.ToLower(path) != path:
		return bad("the repository %s must be lowercase", path)
	case !isRepository(path):
		return bad("%s is invalid as a repository", path)
	case object != "":
		return bad("the object is an argument of its own: write %s/%s %s", host, path, object[1:])
	}
	return Locator{Host: host, Name: path}, nil
}

// hub is the host of names that docker writes without one.
const hub = "docker.io"

// isPath reports whether a locator is the path of a directory.
func isPath(s string) bool {
	return s == "." || s == ".." || strings.HasPrefix(s, "/") || strings.HasPrefix(s, "./") || strings.HasPrefix(s, "../")
}

// The grammar of names is that of github.com/distribution/reference. It is not used itself, because its regular expressions would
// double the time in which every command starts that talks to a remote.

// maxRepository bounds the name of a repository.
const maxRepository = 255

// isRepository reports whether s names a repository, without its host.
func isRepository(s string) bool {
	if len(s) > maxRepository {
		return false
	}
	for component := range strings.SplitSeq(s, "/") {
		if !isComponent(component) {
			return false
		}
	}
	return true
}

// isComponent reports whether s is lower-case letters and digits, with a dot, one or two underscores or any number of dashes in between.
func isComponent(s string) bool {
	separators := 0 // in a row
	for i := range len(s) {
		switch c := s[i]; {
		case c == '.', c == '_', c == '-':
			separators++
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
			if before := s[i-separators : i]; before != "" && (before == s[:i] || !isSeparator(before)) {
				return false
			}
			separators = 0
		default:
			return false
		}
	}
	return s != "" && separators == 0
}

func isSeparator(s string) bool {
	return s == "." || s == "_" || s == "__" || strings.Trim(s, "-") == ""
}

// isHost reports whether s is a domain name or an address, an IPv6 address in brackets, with or without a port.
func isHost(s string) bool {
	const digits = "0123456789"
	if i := strings.LastIndexByte(s, ':'); i >= 0 && !strings.HasSuffix(s, "]") {
		if i+1 == len(s) || strings.Trim(s[i+1:], digits) != "" {
			return false
		}
		s = s[:i]
	}
	if strings.HasPrefix(s, "[") && strings.HasSuffix(s, "]") {
		return len(s) > 2 && strings.Trim(s[1:len(s)-1], digits+"abcdefABCDEF:") == ""
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || label[0] == '-' || label[len(label)-1] == '-' || strings.ContainsFunc(label, isNoLabel) {
			return false
		}
	}
	return true
}

func isNoLabel(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-'
}

// object is a tag or a digest.
type object struct {
	tag    string
	digest digest.Digest
}

func (o object) String() string {
	if o.tag != "" {
		return o.tag
	}
	return o.digest.String()
}

// join writes the object behind its repository as references do.
func (o object) join(repository string) string {
	if o.tag != "" {
		return repository + ":" + o.tag
	}
	return repository + "@" + o.digest.String()
}

func parseObject(s string) (object, error) {
	if strings.Contains(s, ":") {
		d, err := digest.Parse(s)
		if err != nil {
			return object{}, classf(errdefs.ErrInvalidArgument, "object %q: %v", s, err)
		}
		return object{digest: d}, nil
	}
	if !isTag(s) {
		return object{}, classf(errdefs.ErrInvalidArgument, "object %q: neither a tag nor a digest", s)
	}
	return object{tag: s}, nil
}

// isTag follows the grammar of tags in the OCI distribution specification.
func isTag(s string) bool {
	if s == "" || len(s) > 128 {
		return false
	}
	for i, r := range s {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '_':
		case i > 0 && (r == '.' || r == '-'):
		default:
			return false
		}
	}
	return true
}
