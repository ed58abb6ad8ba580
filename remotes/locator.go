package remotes

import (
	"strings"

	"distkit/disk/program"
	"distkit/refname"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	// The algorithms of digests that OCI registers.
	_ "crypto/sha256"
	_ "crypto/sha512"
)

// Locator is a parsed locator. It has either Host and Name of a repository, or the Path of a directory, or a Helper
// with its Address.
type Locator struct {
	Host string // as in image names: docker.io, localhost:5000
	Name string // such as library/redis
	Path string

	Helper, Address string
}

// String returns the locator in its usual form.
func (l Locator) String() string {
	if l.Path != "" {
		return l.Path
	}
	if l.Helper != "" {
		return l.Helper + "::" + l.Address
	}
	return l.Host + "/" + l.Name
}

// ParseLocator parses a locator:
//
//   - HOST/NAME is a repository, normalised as docker does: docker.io/redis is docker.io/library/redis.
//   - A path begins with "/", "./" or "../".
//   - NAME::ADDRESS is for the program dist-remote-NAME.
//
// Errors are InvalidArgument, and say how to write it correctly.
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
	if name, address, ok := strings.Cut(s, "::"); ok && program.IsName(name) {
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
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return bad("%v", err)
	}
	if !reference.IsNameOnly(named) {
		object := strings.TrimLeft(strings.TrimPrefix(named.String(), named.Name()), ":@")
		return bad("the object is an argument of its own: write %s %s", named.Name(), object)
	}
	if reference.Domain(named) == "" { // for example with "_" in it, which is valid in a name but not in a host
		return bad("%s is invalid as a host", host)
	}
	return Locator{Host: reference.Domain(named), Name: reference.Path(named)}, nil
}

// isPath reports whether a locator is a path.
func isPath(s string) bool {
	return s == "." || s == ".." || strings.HasPrefix(s, "/") || strings.HasPrefix(s, "./") || strings.HasPrefix(s, "../")
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

// join appends the object to a repository's name, as in a reference.
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
	if !refname.IsTag(s) {
		return object{}, classf(errdefs.ErrInvalidArgument, "object %q: neither a tag nor a digest", s)
	}
	return object{tag: s}, nil
}
