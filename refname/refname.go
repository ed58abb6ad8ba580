// Package refname is the grammar of the names that the OCI distribution protocol carries. A client and a server must agree on it.
package refname

import (
	"strings"

	"github.com/distribution/reference"
)

// DefaultTag is the tag of a reference that has neither tag nor digest.
const DefaultTag = "latest"

// maxRepository bounds the name of a repository without its host, in bytes: clients limit both together to 255.
const maxRepository = 255

// IsRepository reports whether s is the name of a repository without its host, such as library/redis.
func IsRepository(s string) bool {
	if len(s) > maxRepository {
		return false
	}
	_, err := reference.WithName("host.example/" + s)
	return err == nil
}

// IsTag reports whether s is a tag.
func IsTag(s string) bool {
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

// Split takes the name of an image apart. tag is empty if the name has a digest and no tag. ok is false for what is no
// repository with a tag or digest: a repository that begins with a host and its port is none, since the protocol has no
// colon there.
func Split(name string) (repository, tag string, ok bool) {
	name, dgst, digested := strings.Cut(name, "@")
	slash := strings.LastIndexByte(name, '/')
	repository, tag, tagged := strings.Cut(name[slash+1:], ":")
	repository = name[:slash+1] + repository
	if tagged && !IsTag(tag) || digested && dgst == "" || !tagged && !digested {
		return "", "", false
	}
	return repository, tag, IsRepository(repository)
}

// The repositories of docker's own registry that have no user are in library, which is left out where people write them.
const hub, official = "docker.io/", "docker.io/library/"

// Normalize returns the name in which docker.io/redis is docker.io/library/redis. It adds no tag.
func Normalize(name string) string {
	if short, ok := strings.CutPrefix(name, hub); ok && short != "" && !strings.Contains(short, "/") {
		return official + short
	}
	return name
}

// Spellings returns the names under which a store may have what a user calls name, in the order in which they count: name, and if it has
// neither tag nor digest, name with the default tag; each as [Normalize] makes it, and then as stores may have it that were made before
// names were normalized.
func Spellings(name string) []string {
	tagged := []string{name}
	if base := name[strings.LastIndexByte(name, '/')+1:]; base != "" && !strings.ContainsAny(base, ":@") {
		tagged = append(tagged, name+":"+DefaultTag)
	}
	var all []string
	for _, s := range tagged {
		full := Normalize(s)
		all = append(all, full)
		if short, ok := strings.CutPrefix(full, official); ok && !strings.Contains(short, "/") {
			all = append(all, hub+short)
		}
	}
	return all
}
