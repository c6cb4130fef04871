"""The site: each repair on a few lines of HTML, a small site and the real one, both also in a browser."""
import base64
import functools
import http.server
import json
import os
import re
import shutil
import stat
import threading
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell

from dt_pretrain import site as site_module
from dt_pretrain.site import (SiteError, box_wide_images, build_site, check_links, describe_images, dress_tables, drop_css_imports, drop_foreign, ease_access, link_pages,
                              link_references, localise, number_floats, process, readme_from, render, use_katex, write_sitemap)

ROOT = Path(__file__).parents[1]
PAGES = sorted(p.relative_to(ROOT / 'nbs').with_suffix('.html').as_posix() for p in (ROOT / 'nbs').rglob('*.ipynb')
               if not any(part[0] in '._' for part in p.relative_to(ROOT / 'nbs').parts))
BASE = 'dt_pretrain'  # served under a path, as a project's pages are
PNG = 'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='
CONFIG = """project: {type: website}
format: {html: {theme: {light: cosmo, dark: darkly}, css: styles.css, toc: true}}
website:
  title: Small
  favicon: favicon.svg
  search: true
  navbar: {background: light, left: [{text: Other, href: guides/0_other.ipynb}]}
  sidebar: {style: docked, contents: [index.ipynb, guides/0_other.ipynb]}
"""


def soup(html): return BeautifulSoup(html, 'html.parser')


def write(path, title, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[new_raw_cell(f'---\ntitle: {title}\ndescription: About {title.lower()}\n---'), *cells],
                                metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}}), path)


def wide_table(columns=20):
    head, cells = ''.join(f'<th>column_{i}</th>' for i in range(columns)), '<td>12.345 ± 0.1</td>' * columns
    return ('<div><style scoped>.dataframe tbody tr th {}</style><table border="1" class="dataframe"><thead><tr style="text-align: right;"><th></th>' + head
            + f'</tr></thead><tbody><tr><th>hopper</th>{cells}</tr></tbody></table><a href="guides/0_other.ipynb">other</a></div>')


def small_notebooks(nbs):
    "A home page with everything that needs repair, and a page that it links to."
    write(nbs / 'index.ipynb', 'Home',
          new_markdown_cell('The [other page](guides/0_other.ipynb#part), @fig-dot, [@tbl-wide] and $e^{i\\pi} = -1$.\n\n$$\\sum_t r_t$$\n\nA name: `get_task`. Zanzibar.'),
          new_code_cell('#| label: fig-dot\n#| fig-cap: A dot\nplot()', outputs=[new_output('display_data', {'image/png': PNG})]),
          new_code_cell('#| label: tbl-wide\n#| tbl-cap: Wide\nscores', outputs=[new_output('execute_result', {'text/html': wide_table()})]),
          new_markdown_cell('::: {.verdict .supported}\n**Supported.** By @fig-dot.\n:::'),
          new_code_cell('x = """' + 'long ' * 60 + '"""\nfrom os import path\nundefined_name'),
          new_code_cell('#| hide\nsecret = 1'))
    write(nbs / 'guides/0_other.ipynb', 'Other', new_markdown_cell('## Part\n\nBack [home](../index.ipynb). No @fig-here in `@fig-code`.'),
          new_code_cell('#| label: fig-here\n#| fig-cap: Here\nplot()', outputs=[new_output('display_data', {'image/png': PNG})]))
    write(nbs / 'components/tasks.ipynb', 'Tasks', new_code_cell('#| default_exp tasks'), new_code_cell('#| export\ndef get_task(\n    name: str,\n): "The task of that name."'))
    (nbs / '_quarto.yml').write_text(CONFIG.replace('guides/0_other.ipynb]}', 'guides/0_other.ipynb, components/tasks.ipynb]}'))
    for name in ('styles.css', 'favicon.svg'): shutil.copy(ROOT / 'nbs' / name, nbs / name)
    return nbs


@pytest.fixture(scope='session')
def small(tmp_path_factory):
    "A small site and the folders it came from."
    folder = tmp_path_factory.mktemp('small')
    small_notebooks(folder / 'nbs'); process(folder / 'nbs', folder / 'proc')
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(site_module.shutil, 'which', lambda name, *_: None)
        render(folder / 'proc', folder / 'www' / BASE, f'/{BASE}')
    return folder


@pytest.fixture(scope='session')
def real(tmp_path_factory):
    "The project's own site."
    folder = tmp_path_factory.mktemp('real')
    build_site(ROOT / 'nbs', folder / BASE)
    return folder


# ---- one repair at a time

def test_figures_and_tables_are_numbered_in_order_and_by_kind():
    page = soup('<div class="cell" id="fig-b"><pre>code</pre><div class="quarto-figure"><figure><img/><figcaption>B</figcaption></figure></div></div>'
                '<div class="cell" id="tbl-t"><table><caption>T</caption></table></div><figure id="fig-a"><figcaption>A</figcaption></figure>')
    assert number_floats(page) == {'fig-b': 'Figure 1', 'tbl-t': 'Table 1', 'fig-a': 'Figure 2'}
    assert [c.text for c in page.find_all(['figcaption', 'caption'])] == ['Figure 1: B', 'Table 1: T', 'Figure 2: A']
    assert page.find(id='fig-b')['class'] == ['quarto-figure'] and page.find(id='tbl-t').name == 'table'


def test_a_cell_that_was_not_run_keeps_its_place():
    page = soup('<p>@fig-a @fig-b</p><div class="cell" id="fig-a"><pre>plot()</pre></div><figure id="fig-b"><figcaption>B</figcaption></figure>')
    link_references(page, number_floats(page))
    assert page.p.text == 'Figure 1 Figure 2' and page.figcaption.text == 'Figure 2: B'
    page = soup('<div class="cell" id="fig-a"><div class="cell-output">no figure</div></div>')
    assert number_floats(page) == {}


def test_captions_that_have_a_number_keep_it():
    page = soup('<div id="fig-a"><figure><figcaption>Figure\xa01: A</figcaption></figure></div><p><a href="#fig-a">Figure 1</a></p>')
    before = str(page)
    link_references(page, number_floats(page))
    assert str(page) == before


def test_an_image_with_a_label_is_numbered_by_its_figure():
    page = soup('<figure><img id="fig-x"/><figcaption>X</figcaption></figure>')
    assert number_floats(page) == {'fig-x': 'Figure 1'} and page.figcaption.text == 'Figure 1: X'


def test_references_become_links_but_not_in_code():
    page = soup('<p>(@fig-a), [@fig-a]; -@fig-a. <code>@fig-a</code> me@fig-a.org @fig-b</p><pre>@fig-a</pre>')
    link_references(page, {'fig-a': 'Figure 3'})
    assert page.p.text == '(Figure 3), Figure 3; 3. @fig-a me@fig-a.org @fig-b' and page.pre.text == '@fig-a'
    assert [(a['href'], a.text) for a in page.find_all('a')] == [('#fig-a', 'Figure 3'), ('#fig-a', 'Figure 3'), ('#fig-a', '3')]


def test_tables_get_classes_a_box_and_aligned_numbers():
    page = soup('<style scoped>x</style><table border="1" class="dataframe"><thead><tr style="text-align: right;"><th></th><th>n</th><th>name</th></tr></thead>'
                '<tbody><tr><th>a</th><td>-1.5 ± 2</td><td>b1</td></tr><tr><th>c</th><td>nan</td><td>3</td></tr></tbody></table>')
    dress_tables(page)
    table = page.table
    assert {'table', 'dataframe'} <= set(table['class']) and table.parent['class'] == ['table-responsive'] and not page.find('style')
    assert table.get('border') is None and [c.text for c in table.select('.num')] == ['n', '-1.5 ± 2', 'nan']
    once = str(page); dress_tables(page)
    assert str(page) == once


def test_long_numbers_may_break_and_what_heads_nothing_is_no_header():
    page = soup('<table><thead><tr><th></th><th>effect</th><th>n</th></tr></thead><tbody><tr><th>a</th><td>0.017 (-0.051 to 0.085)</td><td>3</td></tr></tbody></table>')
    dress_tables(page)
    assert [c.get('class') for c in page.tbody.find_all('td')] == [['num', 'long'], ['num']]
    assert [c.name for c in page.thead.tr.find_all(['td', 'th'])] == ['td', 'th', 'th']


def test_the_index_name_joins_the_header():
    page = soup('<table><thead><tr><th></th><th>v</th></tr><tr><th>name</th><th></th></tr></thead><tbody><tr><th>a</th><td>x</td></tr></tbody></table>')
    dress_tables(page)
    assert [[c.text for c in row.find_all('th')] for row in page.select('thead tr')] == [['name', 'v']]
    page = soup('<table><thead><tr><th></th><th>a</th></tr><tr><th></th><th>b</th></tr></thead></table>')
    dress_tables(page)
    assert len(page.select('thead tr')) == 2


def test_links_to_notebooks_become_links_to_pages():
    page = soup('<a href="../a/b.ipynb#x">1</a><a href="c.ipynb">2</a><a href="/a/b.ipynb">3</a><a href="https://o.org/b.ipynb">4</a><a href="none.ipynb">5</a>')
    link_pages(page, 'g/h.html', {'a/b.html', 'g/c.html'})
    assert [a['href'] for a in page.find_all('a')] == ['../a/b.html#x', 'c.html', '../a/b.html', 'https://o.org/b.ipynb', 'none.ipynb']


def test_links_to_names_become_local(tmp_path):
    (tmp_path / 'components').mkdir(); (tmp_path / 'components/01_tasks.ipynb').touch()
    text = localise('[`f`](https://h.org/dt/components/tasks.html#f) [`g`](https://h.org/dt/components/none.html#g) [`h`](https://h.org/dtx/components/tasks.html)',
                    'https://h.org/dt', tmp_path)
    assert text == '[`f`](/components/01_tasks.ipynb#f) [`g`](https://h.org/dt/components/none.html#g) [`h`](https://h.org/dtx/components/tasks.html)'


def test_other_hosts_are_dropped_but_not_links_to_them():
    page = soup('<head><script src="https://c.org/a.js"></script><script src="own.js"></script><link rel="stylesheet" href="//c.org/a.css"/><link rel="stylesheet" href="own.css"/>'
                '<link rel="canonical" href="https://me.org"/></head><a href="https://c.org">c</a>')
    drop_foreign(page)
    assert [t.get('src') or t.get('href') for t in page.find_all(['script', 'link', 'a'])] == ['own.js', 'own.css', 'https://me.org', 'https://c.org']


@pytest.mark.parametrize('css', ['@import url(https://f.org/c?a:1;2&d);', '@import url("https://f.org/c?a:1;2");', "@import '//f.org/c.css' screen;", '@import "http://f.org/c.css";'])
def test_fonts_of_other_hosts_are_dropped(css):
    assert drop_css_imports(css + 'a{b:url(x.png)}') == 'a{b:url(x.png)}'
    assert drop_css_imports('@import "x.css";a{}') == '@import "x.css";a{}'


def test_katex_is_loaded_where_there_is_mathematics():
    page, plain = soup('<head></head><body><span class="math inline">x</span></body>'), soup('<head></head><body></body>')
    use_katex(page, '../'); use_katex(plain, '../')
    assert [s['src'] for s in page.find_all('script')] == ['../site_libs/katex/katex.min.js', '../site_libs/katex/render.js'] and not plain.find('script')


def test_images_get_a_description():
    page = soup('<figure><img src="a"/><figcaption>Figure 1:\n A</figcaption></figure><img alt="own" src="b"/>')
    describe_images(page)
    assert [i['alt'] for i in page.find_all('img')] == ['Figure 1: A', 'own']


def wide_png(width): return 'data:image/png;base64,' + base64.b64encode(b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR' + width.to_bytes(4, 'big') + bytes(40)).decode()


def test_wide_images_get_a_box(tmp_path):
    (tmp_path / 'a b.png').write_bytes(base64.b64decode(wide_png(1240).partition(',')[2])); (tmp_path / 'small.png').write_bytes(base64.b64decode(PNG))
    page = soup(f'<main><p><img src="{wide_png(1240)}"/><img src="{wide_png(700)}"/><img src="a%20b.png"/><img src="small.png"/><img src="none.png"/><img src="x.svg"/></p>'
                '<picture><img src="a%20b.png"/></picture></main>')
    box_wide_images(page, tmp_path)
    assert [i.parent.get('class') for i in page.find_all('img')] == [['wide-figure'], None, ['wide-figure'], None, None, None, None]
    once = str(page); box_wide_images(page, tmp_path)
    assert str(page) == once


def test_landmarks_have_names_and_buttons_are_buttons():
    page = soup('<head></head><nav class="navbar"></nav><nav class="page-navigation"></nav><a role="navigation" data-bs-toggle="collapse">F</a><main></main>')
    ease_access(page, '../')
    assert [n['aria-label'] for n in page.find_all('nav')] == ['Site', 'Previous and next page']
    assert (page.a['role'], page.a['tabindex'], page.script['src']) == ('button', '0', '../site_libs/keyboard.js')


def test_a_sitemap_has_addresses(tmp_path):
    write_sitemap(tmp_path, 'https://h.org/dt/', {'index.html', '404.html', 'a/b & c.html', 'a/index.html'})
    assert [e.text for e in ElementTree.parse(tmp_path / 'sitemap.xml').iter() if e.tag.endswith('loc')] == ['https://h.org/dt/a/b%20%26%20c.html', 'https://h.org/dt/a/', 'https://h.org/dt/']


# ---- the check

BROKEN = {
    '<a href="none.html">x</a>': 'missing file: none.html',
    '<a href="#none">x</a>': 'missing anchor: index.html#none',
    '<a href="/index.html">x</a>': 'depends on where the site lies',
    '<a href="../up.html">x</a>': 'missing file: ../up.html',
    '<img src="none.png">': 'img to a missing file: none.png',
    '<img src="https://o.org/a.png">': 'img from another host',
    '<picture><source srcset="none.webp 2x"></picture>': 'source to a missing file: none.webp',
    '<script src="//o.org/a.js"></script>': 'script from another host',
    '<link rel="stylesheet" href="https://o.org/a.css">': 'link from another host',
    '<style>@import "https://o.org/f.css"; a{background:url(none.png)}</style>': 'style from another host: https://o.org/f.css',
    '<iframe src="https://o.org"></iframe>': 'iframe from another host',
    '<p>See @fig-x.</p>': 'reference to nothing on this page: @fig-x',
    '<figure id="fig-x"></figure>': 'no caption: fig-x',
    '<div class="cell" id="fig-x"><div class="cell-output"><img src="data:image/png;base64,x"></div></div>': 'no caption: fig-x',
}


@pytest.mark.parametrize('html', BROKEN)
def test_the_check_finds(tmp_path, html):
    (tmp_path / 'index.html').write_text(f'<html><body>{html}</body></html>')
    assert any(BROKEN[html] in problem for problem in check_links(tmp_path)), check_links(tmp_path)


def test_the_check_accepts_what_is_right(tmp_path):
    (tmp_path / 'a').mkdir(); (tmp_path / 'a/index.html').touch(); (tmp_path / 'x y.png').touch(); (tmp_path / 's.css').write_text('a{b:url("x%20y.png");c:url(data:x)}')
    (tmp_path / 'index.html').write_text('<a href="https://o.org">o</a><a href="a/">a</a><a href="?q">q</a><a href="#h">h</a><h2 id="h">h</h2><a href="mailto:a@b.c">m</a><a href="#">t</a>'
                                         '<img src="x%20y.png"><img src="data:image/png;base64,x"><code>@fig-x</code><link rel="canonical" href="https://o.org"><link rel="stylesheet" href="s.css">')
    assert check_links(tmp_path) == []
    (tmp_path / 's.css').write_text('a{b:url(none.woff2)}')
    assert check_links(tmp_path) == ['style to a missing file: none.woff2 (on s.css)']


# ---- a small site

def page_of(site, name='index.html'): return soup((site / 'www' / BASE / name).read_text())


def test_a_small_site_is_whole(small):
    page, www = page_of(small), small / 'www' / BASE
    assert check_links(www) == [] and (www / '.nojekyll').exists() and f'href="/{BASE}/"' in (www / '404.html').read_text()
    assert page.select_one('main p').text.startswith('The other page, Figure 1, Table 1 and')
    assert page.select_one('#fig-dot figcaption').text.strip() == 'Figure 1: A dot' and page.select_one('table#tbl-wide caption').text == 'Table 1: Wide'
    links = {a.text: a['href'] for a in page.select('main a')}
    assert links['other page'] == 'guides/0_other.html#part' and links['get_task'] == 'components/tasks.html#get_task' and links['other'] == 'guides/0_other.html'
    assert 'secret' not in page.text and page.select_one('.verdict.supported strong')


def test_exported_names_are_documented_and_cells_are_not_run(small):
    assert 'The task of that name.' in page_of(small, 'components/tasks.html').text  # the cell with `undefined_name` would have failed


def test_the_source_of_exported_names_is_on_the_page_folded(small):
    page = page_of(small, 'components/tasks.html')
    folded = page.select('details.code-fold')
    assert [d.summary.text for d in folded] == ['Source'] and 'def get_task(' in folded[0].text
    assert not page.find_all('a', string='source')


def test_search_knows_names_of_figures(small):
    text = ' '.join(e['text'] for e in json.loads((small / 'www' / BASE / 'search.json').read_text()))
    assert 'Zanzibar' in text and 'Figure 1' in text and '@fig-dot' not in text


def test_a_failed_build_leaves_the_old_site(small, tmp_path):
    shutil.copytree(small / 'www' / BASE, tmp_path / 'site'); shutil.copytree(small / 'nbs', tmp_path / 'nbs')
    before = {p: p.read_bytes() for p in (tmp_path / 'site').rglob('*') if p.is_file()}
    write(tmp_path / 'nbs/guides/0_other.ipynb', 'Other', new_markdown_cell('[gone](../gone.ipynb)'))
    with pytest.raises(SiteError, match=r'link to a missing file: gone.html \(on guides/0_other.html\)'): build_site(tmp_path / 'nbs', tmp_path / 'site')
    assert {p: p.read_bytes() for p in (tmp_path / 'site').rglob('*') if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['nbs', 'site'], 'something was left behind'


def test_building_again_replaces_the_site(small, tmp_path, capsys):
    shutil.copytree(small / 'nbs', tmp_path / 'nbs'); (tmp_path / 'nbs/other').mkdir()
    shutil.copytree(small / 'www' / BASE, tmp_path / 'site'); (tmp_path / 'site/stale.html').write_text('old')
    assert build_site(tmp_path / 'nbs', tmp_path / 'site') == tmp_path / 'site'
    assert not (tmp_path / 'site/stale.html').exists() and (tmp_path / 'site/index.html').exists()
    assert capsys.readouterr().out.startswith('3 pages in ')


def test_a_folder_that_is_no_site_is_left_alone(small, tmp_path):
    (tmp_path / 'thesis.txt').write_text('precious')
    with pytest.raises(SiteError, match='a site that was built before'): render(small / 'proc', tmp_path)
    assert (tmp_path / 'thesis.txt').read_text() == 'precious'


def test_bad_input_is_named(tmp_path):
    with pytest.raises(SiteError, match='no such folder'): process(tmp_path / 'none', tmp_path / 'proc')
    (tmp_path / 'nbs').mkdir()
    with pytest.raises(SiteError, match='no _quarto.yml'): process(tmp_path / 'nbs', tmp_path / 'proc')
    (tmp_path / 'nbs/_quarto.yml').write_text(CONFIG); (tmp_path / 'nbs/bad.ipynb').write_text('{"cells": [')
    with pytest.raises(SiteError, match='bad.ipynb: expected a notebook'): process(tmp_path / 'nbs', tmp_path / 'proc')
    with pytest.raises(SiteError, match='new or empty folder'): process(tmp_path / 'nbs', tmp_path / 'nbs')
    with pytest.raises(SiteError, match='_quarto.yml'): render(tmp_path, tmp_path / 'site')


def test_a_missing_tool_is_named(tmp_path, monkeypatch):
    def missing(name): raise ImportError(name)
    monkeypatch.setattr(site_module, 'import_module', missing)
    with pytest.raises(SiteError, match='pip install'): check_links_of_one_page(tmp_path)


def check_links_of_one_page(folder):
    (folder / 'index.html').write_text('x')
    return check_links(folder)


# ---- Quarto

def fake_quarto(folder, script):
    folder.mkdir(exist_ok=True); exe = folder / 'quarto'
    exe.write_text(f'#!/bin/sh\n{script}\n'); exe.chmod(exe.stat().st_mode | stat.S_IEXEC)
    return f'{folder}{os.pathsep}{os.environ["PATH"]}'


def test_quarto_renders_where_it_is_installed(small, tmp_path, monkeypatch):
    html = '<html><head><script src="https://cdn.org/mathjax.js"></script></head><body><span class="math inline">\\\\(x\\\\)</span> from quarto</body></html>'
    monkeypatch.setenv('PATH', fake_quarto(tmp_path / 'bin', f'echo "$@" > "{tmp_path}/args"; mkdir _site; echo \'{html}\' > _site/index.html'))
    shutil.copytree(small / 'proc', tmp_path / 'proc', ignore=shutil.ignore_patterns('_site'))
    page = soup((render(tmp_path / 'proc', tmp_path / 'site') / 'index.html').read_text())
    assert (tmp_path / 'args').read_text().split()[0] == 'render' and 'from quarto' in page.text
    assert [s['src'] for s in page.find_all('script')] == ['./site_libs/katex/katex.min.js', './site_libs/katex/render.js']


def test_quarto_that_fails_is_reported(small, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', fake_quarto(tmp_path / 'bin', 'echo "no pandoc" >&2; exit 3'))
    with pytest.raises(SiteError, match=r'exit code 3(.|\n)*no pandoc'): render(small / 'proc', tmp_path / 'site')
    assert not (tmp_path / 'site').exists()


# ---- README

def test_readme_says_what_the_first_page_says(small):
    text = readme_from(small / 'nbs/index.ipynb')
    assert text.startswith('# Home\n\nAbout home\n\nThe [other page](nbs/guides/0_other.ipynb#part), Figure 1, Table 1 and $e')
    assert '| hopper | 12.345 ± 0.1 |' in text and '*Figure 1: A dot (on the site)*' in text and '> **Supported.** By Figure 1.' in text
    assert 'secret' not in text and 'base64' not in text and PNG not in text and '#|' not in text and ':::' not in text


def test_readme_finds_the_pictures_of_the_site(tmp_path):
    write(tmp_path / 'index.ipynb', 'T', new_markdown_cell('<picture><source srcset="images/a.png"><img src="images/a.webp"></picture> <img src="https://o.org/a.png"> <a href="b.ipynb">\n\n`src="x"`'))
    assert readme_from(tmp_path / 'index.ipynb').endswith('<source srcset="nbs/images/a.png"><img src="nbs/images/a.webp"></picture> <img src="https://o.org/a.png"> <a href="nbs/b.ipynb">\n\n`src="x"`\n')


def test_readme_follows_the_options_of_cells(tmp_path):
    out = [new_output('stream', name='stdout', text='printed\n'), new_output('stream', name='stderr', text='warned\n')]
    write(tmp_path / 'index.ipynb', 'T', new_code_cell('#| echo: false\na = 1', outputs=out), new_code_cell('#|output: false\nb = 2', outputs=out), new_code_cell('#| include: false\nc = 3', outputs=out),
          new_code_cell('#| echo: false\nd', outputs=[new_output('display_data', {'text/markdown': '[f](findings/1.ipynb)'})]))
    assert readme_from(tmp_path / 'index.ipynb') == '# T\n\nAbout t\n\n```\nprinted\n```\n\n```python\nb = 2\n```\n\n[f](nbs/findings/1.ipynb)\n'


def test_readme_needs_a_notebook_with_a_title(tmp_path):
    (tmp_path / 'a.ipynb').write_text('no')
    with pytest.raises(SiteError, match='a.ipynb: expected a notebook'): readme_from(tmp_path / 'a.ipynb')
    nbformat.write(new_notebook(cells=[new_markdown_cell('x')]), tmp_path / 'b.ipynb')
    with pytest.raises(SiteError, match='a title at the top'): readme_from(tmp_path / 'b.ipynb')


# ---- in a browser

@pytest.fixture(scope='session')
def browser():
    exe = shutil.which('chromium')
    if exe is None:
        if os.environ.get('CI'): pytest.fail('chromium is not installed, and on CI the site must be tested in a browser')
        pytest.skip('chromium is not installed: the site is not tested in a browser')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        flags = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
        browser = p.chromium.launch(executable_path=exe, args=flags)
        yield browser
        browser.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


def served(folder):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f'http://127.0.0.1:{server.server_port}/{BASE}/'


@pytest.fixture(scope='session')
def small_url(small):
    server, url = served(small / 'www'); yield url; server.shutdown()


@pytest.fixture(scope='session')
def real_url(real):
    server, url = served(real); yield url; server.shutdown()


@pytest.fixture
def tab(browser):
    "A page of the browser that notes what goes wrong in `tab.faults`."
    tab = browser.new_page(viewport={'width': 1280, 'height': 900}); tab.set_default_timeout(60_000)
    tab.faults = faults = []
    tab.on('console', lambda m: faults.append(f'console: {m.text}') if m.type in ('error', 'warning') else None)
    tab.on('pageerror', lambda e: faults.append(f'error: {e}'))
    tab.on('requestfailed', lambda r: faults.append(f'failed: {r.url}'))
    tab.on('response', lambda r: faults.append(f'{r.status}: {r.url}') if r.status >= 400 else None)
    tab.on('request', lambda r: faults.append(f'another host: {r.url}') if not r.url.startswith(('http://127.0.0.1:', 'data:', 'file:')) else None)
    yield tab
    tab.close()


def inspect(tab, url):
    "Load a page and return everything that is wrong with it."
    tab.goto(url, wait_until='networkidle')
    wrong = list(tab.faults)
    wrong += tab.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => 'broken image ' + i.src.slice(0, 80))")
    wrong += tab.evaluate("[...document.querySelectorAll('span.math')].filter(m => !m.querySelector('.katex')).map(m => 'no mathematics: ' + m.textContent)")
    wrong += tab.evaluate("[...document.querySelectorAll('.katex-error')].map(m => 'bad formula: ' + m.textContent)")
    for width in (1280, 390):
        tab.set_viewport_size({'width': width, 'height': 800})
        found = tab.evaluate("""() => [document.documentElement.scrollWidth, innerWidth, [...document.querySelectorAll('main *')]
            .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && ![...function*() { for (let p = e.parentElement; p; p = p.parentElement) yield p }()]
            .some(p => ['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX))).map(e => e.outerHTML.slice(0, 80)).slice(0, 3)]""")
        if found[0] > found[1] or found[2]: wrong.append(f'at width {width} the page is {found[0]} wide, and this sticks out or is cut off: {found[2]}')
    return wrong


@pytest.mark.parametrize('name', ['index.html', 'guides/0_other.html', 'components/tasks.html'])
def test_small_pages_in_the_browser(tab, small_url, name):
    assert inspect(tab, small_url + name) == []


def test_mathematics_is_drawn(tab, small_url):
    tab.goto(small_url, wait_until='networkidle')
    assert tab.locator('span.math .katex').count() == 2 and tab.locator('.math.display .katex-display').count() == 1
    assert tab.evaluate("document.fonts.check('16px KaTeX_Math')")


@pytest.mark.parametrize('damage, fault', [
    ('<script>throw new Error("boom")</script>', 'boom'), ('<img src="none.png" alt="">', 'broken image'), ('<span class="math inline">\\(\\nonsense{\\)</span>', 'bad formula'),
    ('<div style="width: 2000px">x</div>', 'at width 390'), ('<script src="none.js"></script>', '404'), ('<img src="http://localhost:1/a.png" alt="">', 'another host')])
def test_the_browser_finds(tab, small, tmp_path, damage, fault):
    shutil.copytree(small / 'www' / BASE, tmp_path / BASE)
    page = tmp_path / BASE / 'index.html'; page.write_text(page.read_text().replace('</main>', f'{damage}</main>'))
    server, url = served(tmp_path)
    assert any(fault in wrong for wrong in inspect(tab, url)), inspect(tab, url)
    server.shutdown()


def contrast(tab, selector):
    "Contrast ratio (WCAG) of an element's text with the nearest background behind it."
    return tab.evaluate("""selector => {
        const lum = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b };
        const e = document.querySelector(selector); let p = e, bg;
        do { bg = getComputedStyle(p).backgroundColor; p = p.parentElement } while (p && /, 0\\)$/.test(bg));
        const [a, b] = [lum(getComputedStyle(e).color), lum(bg)].sort(); return (b + .05) / (a + .05) }""", selector)


def search(tab, word):
    tab.locator('#quarto-search input').fill(word)
    tab.locator('.search-result').first.wait_for()
    return tab.locator('.search-result')


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_search_finds_and_can_be_read(browser, small_url, scheme):
    tab = browser.new_page(color_scheme=scheme)
    tab.goto(small_url + 'guides/0_other.html', wait_until='networkidle')
    results = search(tab, 'Zanzibar')
    assert 'Home' in results.first.inner_text() and 'Zanzibar' in results.first.inner_text()
    assert contrast(tab, '.search-result-title') > 4.5 and contrast(tab, '.search-result-text') > 4.5 and contrast(tab, 'main p') > 7
    results.first.click(); tab.wait_for_url('**/index.html*')
    tab.close()


def test_search_works_without_a_server(tab, small):
    tab.goto((small / 'www' / BASE / 'guides/0_other.html').as_uri(), wait_until='networkidle')
    assert 'Zanzibar' in search(tab, 'Zanzibar').first.inner_text() and tab.faults == []


def test_references_lead_to_their_figure(tab, small_url):
    tab.goto(small_url, wait_until='networkidle')
    tab.locator('main a.quarto-xref', has_text='Figure 1').first.click()
    assert tab.url.endswith('#fig-dot') and tab.locator('#fig-dot').is_visible()


def axe(tab, url):
    "What axe-core finds on a page that is serious: rule, place, why."
    from axe_playwright_python.sync_playwright import Axe
    tab.goto(url, wait_until='networkidle')
    return [f"{v['id']}: {' '.join(map(str, n['target']))}: {[m['message'] for m in n['any'] + n['all'] + n['none']]}"
            for v in Axe().run(tab).response['violations'] if v['impact'] in ('serious', 'critical') for n in v['nodes']]


def in_scheme(browser, scheme, width): return browser.new_page(viewport={'width': width, 'height': 844}, color_scheme=scheme)


@pytest.mark.parametrize('damage, rule', [('<p style="color: #aaa; background: #fff">pale</p>', 'color-contrast'), ('<img src="favicon.svg">', 'image-alt'), ('<button></button>', 'button-name')])
def test_axe_finds(tab, small, tmp_path, damage, rule):
    shutil.copytree(small / 'www' / BASE, tmp_path / BASE)
    page = tmp_path / BASE / 'index.html'; page.write_text(page.read_text().replace('</main>', f'{damage}</main>'))
    server, url = served(tmp_path)
    assert [found.split(':')[0] for found in axe(tab, url)] == [rule]
    server.shutdown()


def test_wide_figures_and_tables_stay_legible_on_a_phone(browser, small, tmp_path):
    shutil.copytree(small / 'www' / BASE, tmp_path / BASE)
    page = tmp_path / BASE / 'index.html'
    page.write_text(page.read_text().replace('</main>', f'<figure class="figure"><span class="wide-figure"><img alt="wide" src="{wide_png(1240)}"></span><figcaption>{"word " * 60}</figcaption></figure></main>'))
    server, url = served(tmp_path)
    tab = in_scheme(browser, 'light', 390); tab.goto(url, wait_until='networkidle')
    width = lambda selector: tab.locator(selector).first.bounding_box()['width']
    assert width('.wide-figure img') >= 500 and width('.wide-figure') < 390 and width('main figcaption') < 390
    assert width('main table') > 390 > width('.table-responsive') and width('main caption') < 390
    assert tab.evaluate("getComputedStyle(document.querySelector('.wide-figure'), '::after').content").startswith('"wide figure')
    assert tab.locator('.wide-figure').get_attribute('tabindex') == '0' == tab.locator('.table-responsive').first.get_attribute('tabindex')
    tab.set_viewport_size({'width': 1280, 'height': 800})
    tab.wait_for_function("!document.querySelector('.wide-figure').hasAttribute('tabindex')")
    tab.close(); server.shutdown()


def test_the_sidebar_opens_by_keyboard(tab, small_url):
    tab.goto(small_url, wait_until='networkidle')
    for toggle in tab.locator('#quarto-sidebar a[role=button]').all():
        before = toggle.get_attribute('aria-expanded'); toggle.press('Enter')
        tab.wait_for_function('([a, before]) => a.getAttribute("aria-expanded") !== before', arg=[toggle.element_handle(), before])


# ---- the real site

def test_the_real_site_is_whole(real):
    assert check_links(real / BASE) == []
    assert {p.relative_to(real / BASE).as_posix() for p in (real / BASE).rglob('*.html')} == {*PAGES, '404.html'}


def test_every_page_is_in_the_sidebar(real):
    page = soup((real / BASE / 'index.html').read_text())
    assert {a['href'] for a in page.select('#quarto-sidebar a[href]')} == set(PAGES)


def test_names_are_linked_to_their_pages(real):
    links = {a['href'] for p in (real / BASE).rglob('*.html') for a in soup(p.read_text()).select('main a[href] > code') for a in [a.parent]}
    assert any('.html#' in href and not href.startswith('http') for href in links), 'no name in backticks became a local link: run nbdev_export'
    assert not [href for href in links if 'github.io' in href]


def written_links(page):
    "Links as they are written in Markdown, in prose and in signatures; examples in code may show some."
    link = re.compile(r'\[`?\w*`?\]\([\w./]+\.(?:ipynb|html)[^)]*\)')
    signatures = [pre.text for pre in page.select('main pre') if re.fullmatch(r'\s*(def|class) [^\n]*|\s*(def|class) .*\n\)[^\n]*', pre.text, re.S)]
    for code in page.select('pre, code'):
        code.decompose()
    return [l for text in ((page.main or page).get_text(), *signatures) for l in link.findall(text)]


def test_no_link_is_shown_as_it_is_written(real):
    shown = '<main>[f](/a.html#f) [<code>h</code>](d.html)<code>[home](e.html)</code><pre>def f(\n  x, # [`g`](/b.ipynb#g)\n)->int:</pre><pre>[g](c.html)</pre></main>'
    assert written_links(soup(shown)) == ['[f](/a.html#f)', '[](d.html)', '[`g`](/b.ipynb#g)']
    found = {p.relative_to(real).as_posix(): written_links(soup(p.read_text())) for p in (real / BASE).rglob('*.html')}
    assert {name: links for name, links in found.items() if links} == {}


@pytest.mark.parametrize('name', PAGES)
def test_real_pages_in_the_browser(tab, real_url, name):
    assert inspect(tab, real_url + name) == []


def test_the_navbar_navigates(tab, real_url):
    tab.goto(real_url, wait_until='networkidle')
    titles = tab.locator('.navbar-nav .nav-link .menu-text').all_inner_texts()
    assert {'Findings', 'Experiments', 'Components'} <= set(titles)
    for title in titles:
        tab.locator('.navbar-nav .nav-link', has_text=title).first.click(); tab.wait_for_load_state('networkidle')
        assert title.lower() in tab.url and tab.locator('h1.title').is_visible()


def test_search_finds_a_finding(tab, real_url):
    tab.goto(real_url, wait_until='networkidle')
    results = search(tab, 'return-to-go')
    assert 'return-to-go' in ' '.join(results.all_inner_texts()).lower() and contrast(tab, '.search-result-title') > 4.5


def test_every_page_has_a_title_a_description_and_an_icon(real):
    pages = {p.relative_to(real / BASE).as_posix(): soup(p.read_text()) for p in sorted((real / BASE).rglob('*.html'))}
    titles, about = ({name: find(page) for name, page in pages.items()} for find in (lambda p: p.title.text.strip(), lambda p: p.find('meta', attrs={'name': 'description'})['content'].strip()))
    assert all(titles.values()) and all(about.values())
    assert len(set(titles.values())) == len(pages) and len(set(about.values())) == len(pages), 'two pages have the same title or description'
    for name, page in pages.items():
        icon = page.find('link', rel='icon')['href']
        assert icon == f'/{BASE}/favicon.svg' if name == '404.html' else (real / BASE / name).parent.joinpath(icon).is_file(), name
        assert len(page.find_all('h1')) == 1, name


def test_the_sitemap_lists_every_page(real):
    found = [e.text for e in ElementTree.parse(real / BASE / 'sitemap.xml').iter() if e.tag.endswith('loc')]
    assert len(found) == len(PAGES) and {re.sub(f'^https://[^/]+/{BASE}/', '', url) or 'index.html' for url in found} == set(PAGES)


def test_the_page_that_is_not_there(browser, real):
    class Host(Quiet):
        def send_error(self, code, *_): self.send_response(code); self.end_headers(); self.wfile.write((real / BASE / '404.html').read_bytes())
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Host, directory=real))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for scheme in ('light', 'dark'):
        tab = in_scheme(browser, scheme, 390); url = f'http://127.0.0.1:{server.server_port}/{BASE}/no/such/page'
        assert axe(tab, url) == []
        tab.locator('a').click(); tab.wait_for_load_state()
        assert tab.locator('h1.title').inner_text() == 'dt_pretrain'
        tab.close()
    server.shutdown()


@pytest.mark.parametrize('width', [1280, 390])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('name', ['index.html', 'findings/5_no_context.html', 'components/rollouts.html'])
def test_axe_has_nothing_serious_to_say(browser, real_url, name, scheme, width):
    tab = in_scheme(browser, scheme, width)
    assert axe(tab, real_url + name) == []
    tab.close()


def numbers(text):
    "All numbers in a text."
    return [float(n) for n in re.findall(r'-?\d+(?:\.\d+)?(?:e[-+]?\d+)?', text.replace('−', '-'))]


def written(x, among): return any(abs(x - n) <= .051 * abs(x) + 5e-4 for n in among)  # two digits


def test_home_says_what_the_findings_found(tab, real_url):
    results = {n: json.loads((ROOT / f'nbs/findings/results/{n}.json').read_text()) for n in range(1, 8)}
    tab.goto(real_url, wait_until='networkidle')
    table = tab.locator('main table', has=tab.locator('a[href*="findings/7_"]')).first
    rows = {int(re.search(r'findings/(\d)_', r.locator('a').first.get_attribute('href'))[1]): r for r in table.locator('tbody tr').all()}
    assert sorted(rows) == list(results) and len(table.locator('tbody tr').all()) == 7
    for n, row in rows.items():
        cells, r = row.locator('td, th').all_inner_texts(), results[n]
        assert r['verdict'] + ' (could not be tried)' * ('untested' in r) in cells, (n, cells)
        said = [x for c in cells[:-1] for x in numbers(c)]
        for x in (r['effect'], *r['interval'], *r['beyond']): assert x is None or written(x, said), (n, x, cells)
        assert cells[-1].strip() == str(r['seeds']), (n, cells)


def test_home_leads_to_every_finding(tab, real_url):
    tab.goto(real_url, wait_until='networkidle')
    for n, href in enumerate(tab.locator('main table a[href*="findings/"]').evaluate_all('links => links.map(a => a.href)'), 1):
        tab.goto(href, wait_until='networkidle')
        assert tab.locator('h1.title').inner_text().startswith(f'{n}.') and not tab.faults


def test_figures_of_home_have_a_text(tab, real_url):
    tab.goto(real_url, wait_until='networkidle')
    assert [i for i in tab.locator('main img').evaluate_all('images => images.map(i => [i.alt, i.src.slice(0, 60)])') if len(i[0]) < 20] == []
