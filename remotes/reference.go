package remotes

import (
	"os"
	"strings"

	"distkit/disk/program"
	"distkit/refname"

	"github.com/containerd/errdefs"
)

// Reference is a parsed reference: LOCATOR[:TAG][@DIGEST].
type Reference struct {
	// Name is the full reference, such as docker.io/library/redis:latest for docker.io/redis.
	Name string `json:"name"`
	// Locator selects the remote. Object is the digest or, without one, the tag, "latest" by default.
	Locator string `json:"locator"`
	Object  string `json:"object"`
	// Explicit reports whether a tag or digest was given, so that Object is not the default.
	Explicit bool `json:"-"`
}

// ParseReference parses a reference without contacting the remote. In a path, the locator is the longest prefix that is
// a directory, because names in a directory may contain slashes and colons too. Errors are InvalidArgument.
func ParseReference(s string) (Reference, error) {
	r, _, err := parseReference(s)
	return r, err
}

// IsReference reports whether s is a reference that nobody could mean as a locator: it has a digest, it is a repository of a registry with
// a tag, or a directory that exists with a name.
func IsReference(s string) bool {
	_, unlike, err := parseReference(s)
	return err == nil && unlike
}

// parseReference is ParseReference. unlike is what [IsReference] reports.
func parseReference(s string) (r Reference, unlike bool, err error) {
	base, dgst := s, ""
	if i := strings.LastIndexByte(s, '@'); i >= 0 {
		if _, ok, err := parseDigest(s[i+1:]); ok && err == nil {
			base, dgst = s[:i], s[i+1:]
		}
	}
	locator, tag := base, ""
	switch {
	case isPath(base):
		for locator != "" && !isDir(locator) && strings.Contains(locator, ":") {
			locator = locator[:strings.LastIndexByte(locator, ':')]
		}
		tag = strings.TrimPrefix(base[len(locator):], ":")
	default:
		locator, tag = cutTag(base)
	}
	l, err := ParseLocator(locator)
	if err != nil {
		return r, false, err
	}
	unlike = dgst != "" || tag != "" && (l.Host != "" || l.Path != "" && isDir(locator))
	r = Reference{Locator: l.String(), Object: tag, Explicit: tag != "" || dgst != ""}
	if l.Host != "" && tag != "" && !refname.IsTag(tag) {
		return r, false, classf(errdefs.ErrInvalidArgument, "reference %q: %q is not a tag", s, tag)
	}
	switch {
	case dgst != "":
		r.Object = dgst
	case tag == "":
		tag, r.Object = refname.DefaultTag, refname.DefaultTag
	}
	r.Name = r.Locator
	if tag != "" {
		r.Name += ":" + tag
	}
	if dgst != "" {
		r.Name += "@" + dgst
	}
	return r, unlike, nil
}

// cutTag splits off a tag. A colon before the last slash is that of a port, and one in "://" belongs to a URL, which a
// helper's address may be. In the path of a helper's address the tag begins at the first colon, because there it may be
// a full name with slashes and colons.
func cutTag(s string) (locator, tag string) {
	if name, address, ok := strings.Cut(s, "::"); ok && program.IsName(name) {
		if _, after, isURL := strings.Cut(address, "://"); isURL {
			address = after
		}
		if _, path, ok := strings.Cut(address, "/"); ok {
			if _, tag, ok := strings.Cut(path, ":"); ok {
				return strings.TrimSuffix(s, ":"+tag), tag
			}
			return s, ""
		}
	}
	slash := strings.LastIndexByte(s, '/')
	if strings.HasSuffix(s[:slash+1], "://") {
		return s, ""
	}
	colon := strings.LastIndexByte(s, ':')
	if colon <= slash || strings.HasSuffix(s[:colon], ":") { // NAME::ADDRESS
		return s, ""
	}
	return s[:colon], s[colon+1:]
}

func isDir(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.IsDir()
}
