"""Right and wrong code with its tests: programs (`input`, `output`) and functions (statements)."""

# ruff: noqa: E501
# A program in a table is read as one line.

from typing import Any

RIGHT: dict[str, tuple[str, list[Any]]] = {
    'generator': ('def read():\n    import sys\n    for line in sys.stdin: yield from line.split()\nit=map(int,read())\nfor _ in range(next(it)): print(next(it)+next(it))', [{'input': '3\n1 2\n3 4\n10 -5\n', 'output': '3\n7\n5\n'}]),
    'itertools': ("import sys\nfrom itertools import islice, starmap\nfrom operator import add\nd=list(map(int,sys.stdin.read().split()))\nprint(*starmap(add,zip(d[1::2],d[2::2])),sep='\\n')", [{'input': '3\n1 2\n3 4\n10 -5\n', 'output': '3\n7\n5\n'}]),
    'heap lt': ("import heapq\nclass J:\n  def __init__(s,p,n): s.p,s.n=p,n\n  def __lt__(s,o): return (-s.p,s.n)<(-o.p,o.n)\nh=[]\nfor _ in range(int(input())):\n  n,p=input().split()\n  heapq.heappush(h,J(int(p),n))\nwhile h: print(heapq.heappop(h).n,end=' ')\nprint()", [{'input': '3\na 1\nb 5\nc 5\n', 'output': 'b c a'}]),
    'recursion': ('import sys\nsys.setrecursionlimit(200000)\ndef d(n): return 0 if n==0 else 1+d(n-1)\nprint(d(int(input())))', [{'input': '50000', 'output': '50000'}]),
    'bigint': ('print(pow(7,int(input())))', [{"input": "4000", "output": str(7**4000)}]),
    'bigint long': ('import sys\nsys.set_int_max_str_digits(0)\nprint(len(str(3**int(input()))))', [{'input': '20000', 'output': '9543'}]),
    'float fmt': ("x=float(input())\nprint(f'{x:.3f}', '%.2e'%x, round(x,1))", [{'input': '3.14159', 'output': '3.142 3.14e+00 3.1'}]),
    'exit in main': ("import sys\ndef main():\n  n=int(input())\n  if n<0:\n    print('neg')\n    sys.exit()\n  print(n)\n  sys.exit(0)\nif __name__=='__main__': main()", [{'input': '-1', 'output': 'neg'}, {'input': '4', 'output': '4'}]),
    'trailing': ("print(' '.join(map(str,range(3))),'  ')\nprint()", [{'input': '', 'output': '0 1 2\n'}]),
    'eof loop': ('try:\n  while 1: print(int(input())*2)\nexcept EOFError: pass', [{'input': '1\n2\n3', 'output': '2\n4\n6\n'}]),
    'no input': ("print('hello, world')", [{'input': '', 'output': 'hello, world'}]),
    'crlf in': ('import sys\nprint(sum(map(int,sys.stdin.readline().split())))', [{'input': '1 2\r\n', 'output': '3\r\n'}]),
    'unicode': ('s=input()\nprint(s[::-1],len(s))', [{'input': 'héé日', 'output': '日ééh 4'}]),
    'blank lines': ("import sys\nd=sys.stdin.read().split('\\n')\nprint(len([x for x in d if x]))", [{'input': 'a\n\nb\n\n', 'output': '2'}]),
    'yes': ("print('YES' if int(input())%2==0 else 'NO')", [{'input': '2', 'output': 'YES\n\n'}, {'input': '1', 'output': 'NO '}]),
    'defaultdict': ('from collections import defaultdict,Counter,deque\ng=defaultdict(list)\nn,m=map(int,input().split())\nfor _ in range(m):\n  a,b=map(int,input().split())\n  g[a].append(b);g[b].append(a)\ns={1};q=deque([1])\nwhile q:\n  for y in g[q.popleft()]:\n    if y not in s: s.add(y);q.append(y)\nprint(len(s))', [{'input': '4 2\n1 2\n2 3\n', 'output': '3'}]),
    'sys.stdout': ("import sys\ninput=sys.stdin.readline\nprint=lambda *a: sys.stdout.write(' '.join(map(str,a))+'\\n')\nprint(int(input())+1)", [{'input': '1\n', 'output': '2'}]),
    'bytes in': ('import sys\nd=sys.stdin.buffer.read().split()\nsys.stdout.write(str(sum(map(int,d[1:]))))', [{'input': '2 3 4', 'output': '7'}]),
    'f eq': ('class P:\n  def __init__(s,x): s.x=x\n  def __eq__(s,o): return isinstance(o,P) and s.x==o.x\n  def __hash__(s): return hash(s.x)\ndef f(x): return P(x)', ['assert f(1)==P(1) and f(1)!=P(2)', 'assert f(1) in [P(1)] and f(1) in {P(1)}']),
    'f sets': ('def f(x): return {frozenset(x)}, set(x)', ['assert f([1,1])==({frozenset({1})},{1})']),
    'f tuple': ('def f(x): return [(a,b) for a,b in zip(x,x[1:])]', ['assert f([1,2,3])==[(1,2),(2,3)]']),
    'f none': ('def f(x):\n  if x: print(x)', ['assert f(0) is None', 'assert f(1)==None']),
    'f gen': ('def f(n):\n  yield from range(n)', ['assert list(f(3))==[0,1,2] and sum(f(4))==6 and next(f(1))==0', 'assert tuple(f(2))==(0,1) and sorted(f(2),reverse=True)==[1,0]']),
    'f float': ('def f(x): return x/3', ['assert abs(f(1)-0.3333)<1e-3 and round(f(2),2)==0.67', 'import math\nassert math.isclose(f(3),1)']),
    'f complex': ('import cmath\ndef f(a,b,c):\n  d=cmath.sqrt(b*b-4*a*c)\n  return (-b+d)/(2*a)', ['assert f(1,0,1)==1j']),
    'f str enum': ("from enum import Enum\nclass S(str,Enum):\n  A='a'\ndef f(): return S.A", ["assert f()=='a' and f() is S.A or f().value=='a'"]),
    'f iter proto': ('class It:\n  def __init__(s,n): s.n=n\n  def __iter__(s):\n    for i in range(s.n): yield i\n  def __len__(s): return s.n\n  def __getitem__(s,i): return i*2\n  def __contains__(s,x): return x==7', ['i=It(3)\nassert list(i)==[0,1,2] and len(i)==3 and i[2]==4 and 7 in i and 1 not in i']),
    'f ctx': ('from contextlib import contextmanager\n@contextmanager\ndef t(l):\n  l.append(1)\n  try: yield l\n  finally: l.append(2)', ['l=[]\nwith t(l) as x: assert x==[1]\nassert l==[1,2]']),
    'f dict tuple': ('def f(w): return {(a,b):w.count(a+b) for a,b in zip(w,w[1:])}', ["assert f('aba')=={('a','b'):1,('b','a'):1}"]),
    'f total': ("from functools import total_ordering, cached_property\n@total_ordering\nclass V:\n  def __init__(s,t): s.t=tuple(map(int,t.split('.')))\n  def __eq__(s,o): return s.t==o.t\n  def __lt__(s,o): return s.t<o.t\n  @cached_property\n  def major(s): return s.t[0]", ["assert V('1.2')<V('1.10') and V('1.0')>=V('0.9') and max(V('1.1'),V('2.0')).major==2", "assert sorted([V('2.0'),V('1.0')])[0].major==1", "assert V('1.0')==V('1.0')"]),
    'named tuple': ('from typing import NamedTuple\nclass R(NamedTuple):\n  lo:int\n  hi:int\n  def size(self): return self.hi-self.lo\ndef f(x): return R(min(x),max(x))', ['assert f([3,1])==(1,3)', 'assert f([3,1]).hi==3', 'assert f([3,1])==R(1,3)', 'lo,hi=f([1,5])\nassert hi-lo==4']),
}  # fmt: skip
WRONG: dict[str, tuple[str, list[Any]]] = {
    'off by one': ('n=int(input())\nfor _ in range(n-1): print(sum(map(int,input().split())))', [{'input': '3\n1 2\n3 4\n10 -5\n', 'output': '3\n7\n5\n'}]),
    'float div': ('n=int(input())\nfor _ in range(n): print(sum(map(int,input().split()))/1)', [{'input': '3\n1 2\n3 4\n10 -5\n', 'output': '3\n7\n5\n'}]),
    'one line': ('n=int(input())\nprint(*[sum(map(int,input().split())) for _ in range(n)])', [{'input': '3\n1 2\n3 4\n10 -5\n', 'output': '3\n7\n5\n'}]),
    'prompt': ("n=int(input('n? '))\nfor _ in range(n): print(sum(map(int,input().split())))", [{'input': '3\n1 2\n3 4\n10 -5\n', 'output': '3\n7\n5\n'}]),
    'tuple for list': ('def f(n): return tuple(range(1,n+1))', ['assert f(3)==[1,2,3]']),
    'set for list': ('def f(n): return set(range(1,n+1))', ['assert f(3)==[1,2,3]']),
    'strings': ('def f(n): return [str(i) for i in range(1,n+1)]', ['assert f(3)==[1,2,3]']),
    'gen for list': ('def f(n): yield from range(1,n+1)', ['assert f(3)==[1,2,3]']),
    'none': ('def f(n): print([1,2,3])', ['assert f(3)==[1,2,3]']),
    'exit code': ("import sys\nn=int(input())\nfor _ in range(n): print(sum(map(int,input().split())))\nsys.exit('done')", [{'input': '3\n1 2\n3 4\n10 -5\n', 'output': '3\n7\n5\n'}]),
    'wrong order': ('def f(n): return list(range(n,0,-1))', ['assert f(3)==[1,2,3]']),
    'frozenset dict': ('def f(n): return dict.fromkeys(range(1,n+1))', ['assert f(3)==[1,2,3]']),
    'reads nothing': ("print('3\\n7')", [{'input': '3\n1 2\n3 4\n10 -5\n', 'output': '3\n7\n5\n'}]),
    'case': ("print('Yes')", [{'input': '', 'output': 'YES'}]),
}  # fmt: skip
